"""`encode_prompt`: diffusers' rows, and the same image when they are passed back, from memory or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export import SanaRuntime
from sana_export.errors import UsageError

SMALL: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 2}
PROMPTS = ["A cute 🐼", "a red apple on a table in an old house"]


def test_it_gives_what_diffusers_gives(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    import inspect

    chi = inspect.signature(tiny_pipeline.__call__).parameters["complex_human_instruction"].default
    reference = tiny_pipeline.encode_prompt(PROMPTS, True, negative_prompt="blurry", complex_human_instruction=chi)
    ours = tiny_runtime.encode_prompt(PROMPTS, True, negative_prompt="blurry")
    embeds, mask, negative, negative_mask = (value.detach().numpy() for value in reference)
    np.testing.assert_array_equal(ours.prompt_attention_mask, mask)
    np.testing.assert_array_equal(ours.negative_prompt_attention_mask, negative_mask)
    for found, wanted, rows in ((ours.prompt_embeds, embeds, mask), (ours.negative_prompt_embeds, negative, negative_mask)):
        assert found is not None
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found[rows == 1], wanted[rows == 1], atol=2e-5)
        assert not found[rows == 0].any()


def test_passed_back_it_draws_the_same_bits(tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    wanted = tiny_runtime(PROMPTS, negative_prompt="blurry", seed=[1, 2], output_type="np", **SMALL).images
    encoded = tiny_runtime.encode_prompt(PROMPTS, negative_prompt="blurry")
    np.savez(tmp_path / "a.npz", **encoded.arrays)
    save_file(encoded.arrays, tmp_path / "a.safetensors")
    for kept in (encoded.arrays, np.load(tmp_path / "a.npz"), load_file(tmp_path / "a.safetensors")):
        np.testing.assert_array_equal(tiny_runtime(**kept, seed=[1, 2], output_type="np", **SMALL).images, wanted)


def test_without_guidance_there_are_no_negative_ones(tiny_runtime: SanaRuntime, sprint_runtime: SanaRuntime) -> None:
    for encoded in (tiny_runtime.encode_prompt("a", do_classifier_free_guidance=False), sprint_runtime.encode_prompt("a")):
        assert list(encoded.arrays) == ["prompt_embeds", "prompt_attention_mask"]
        assert encoded[2:] == (None, None)
    image = sprint_runtime(**sprint_runtime.encode_prompt("a").arrays, seed=1, **SMALL).images[0]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(sprint_runtime("a", seed=1, **SMALL).images[0]))


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ({"prompt": 3}, "a str"),
        ({"prompt": "a", "negative_prompt": ["a", "b"]}, "a list of 1"),
        ({"prompt": "a", "max_sequence_length": 0}, "1 to"),
        ({"prompt": "a", "num_images_per_prompt": 2}, "in the call that takes the embeddings"),
        ({"prompt": "a", "prompt_embeds": [1]}, r"runtime\(prompt_embeds="),
        ({"prompt": "a", "lora_scale": 1.0}, "load_lora"),
        ({"prompt": "a", "negative": "x"}, "negative_prompt"),
    ],
    ids=str,
)
def test_other_words_are_refused_with_what_to_write(tiny_runtime: SanaRuntime, words: dict[str, Any], instead: str) -> None:
    with pytest.raises(UsageError, match=instead):
        tiny_runtime.encode_prompt(**words)


def test_diffusers_words_that_change_nothing_are_taken(tiny_runtime: SanaRuntime) -> None:
    tiny_runtime.encode_prompt("a", device="cpu", num_images_per_prompt=1, clean_caption=False, prompt_embeds=None, lora_scale=None)
