"""Encoded prompts that are kept: never another image, bounded memory, and no text encoder where none is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export import Request, SanaRuntime
from sana_export.errors import UsageError
from sana_export.runtime.embeddings_cache import CacheStatistics, EmbeddingsCache

SMALL: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1, "seed": 1}


def test_the_least_recently_used_go_first() -> None:
    cache = EmbeddingsCache(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A"
    cache.put("d", "D", 4)
    assert [key in cache for key in "abcd"] == [True, False, True, True]
    assert cache.get("b") is None
    assert cache.statistics == CacheStatistics(hits=1, misses=1, entries=3, bytes=10)
    cache.put("d", "D2", 1)
    assert (cache.get("d"), cache.statistics.bytes) == ("D2", 7)
    cache.put("e", "E", 11)
    assert "e" not in cache
    assert cache.statistics.entries == 3
    cache.clear()
    assert cache.statistics == CacheStatistics(hits=2, misses=1, entries=0, bytes=0)


def test_an_image_is_the_same_with_the_cache_and_without(tiny_bundle: Path) -> None:
    with (
        SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", prompt_cache_bytes=0) as without,
        SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime") as runtime,
    ):
        runtime(["another", "a cat of another batch, with a longer text"], **SMALL)
        for prompt in ("a cat", "a cat of another batch, with a longer text", "a cat"):
            words = {"negative_prompt": "ugly", "output_type": "np", **SMALL}
            np.testing.assert_array_equal(runtime(prompt, **words).images, without(prompt, **words).images)
        found = runtime.prompt_cache.statistics
        # ugly, a cat, another, a cat of another batch
        assert (found.hits, found.misses, found.entries) == (4, 4, 4)
        assert 0 < found.bytes < 1 << 20
        assert without.prompt_cache.statistics == CacheStatistics(0, 6, 0, 0)
    assert runtime.prompt_cache.statistics.entries == 0, "close() drops it"


def test_a_hit_is_for_the_same_tokens_and_limits(tiny_runtime: SanaRuntime) -> None:
    tiny_runtime.prompt_cache.clear()

    def misses(**words: Any) -> int:
        before = tiny_runtime.prompt_cache.statistics.misses
        tiny_runtime.embed(tiny_runtime.plan(Request(**{"prompt": "A Cat ", **SMALL, **words})))
        return tiny_runtime.prompt_cache.statistics.misses - before

    assert [misses(), misses(prompt="a cat"), misses(seed=2)] == [1, 0, 0]
    assert [misses(complex_human_instruction=None), misses(complex_human_instruction=["b"])] == [1, 1]
    assert misses(max_sequence_length=2) == 1


def test_every_prompt_is_encoded_alone(tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its rows do not depend on the other prompts of the call."""
    tiny_runtime.prompt_cache.clear()
    session, shapes = tiny_runtime.sessions["text_encoder"], []
    run = session.run

    def recorded(feeds: Any) -> Any:
        shapes.append(feeds["inputs_embeds"].shape[0])
        return run(feeds)

    monkeypatch.setattr(session, "run", recorded)
    tiny_runtime.embed(tiny_runtime.plan(Request(prompt=["a", "b c", "a"], negative_prompt=["x", "y", "z"], seed=1)))
    assert shapes == [1] * 5


def test_a_staged_runtime_loads_no_text_encoder_for_prompts_that_it_knows(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", memory="staged") as runtime:
        loaded: list[str] = []
        load = runtime.backend.load
        monkeypatch.setattr(runtime.backend, "load", lambda graph: (loaded.append(graph), load(graph))[1])
        first = runtime("a cat", **SMALL).images[0]
        assert loaded.count("text_encoder") == 1
        second = runtime("a cat", **SMALL).images[0]
        runtime(**runtime.encode_prompt("a cat").arrays, **SMALL)
        assert (loaded.count("text_encoder"), loaded.count("context")) == (1, 3)
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("count", [-1, 1.5, "1", 1 << 60])
def test_a_size_that_is_none(tiny_bundle: Path, count: Any) -> None:
    with pytest.raises(UsageError, match="prompt_cache_bytes"):
        SanaRuntime.from_pretrained(tiny_bundle, prompt_cache_bytes=count)
