"""What is recorded of a request, and the request that comes back."""

from __future__ import annotations

import json
import shutil
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export import Request, SanaRuntime
from sana_export.errors import UsageError
from sana_export.runtime import metadata
from sana_export.runtime.metadata import redraw
from tests.support.lora_files import diffusers_lora, load_transformer

SMALL: dict[str, Any] = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2}


def drawn_again(runtime: SanaRuntime, document: Any) -> Any:
    again = redraw(json.loads(json.dumps(document)), "it")
    return np.asarray(runtime(**again.words).images[again.index])


def test_every_image_is_drawn_again_from_its_document(tiny_runtime: SanaRuntime) -> None:
    """Own prompts and negative prompts, images for each prompt, and one stream of noise for all."""
    words: dict[str, Any] = {"prompt": ["a cat", "a dog"], "negative_prompt": ["ugly", "blurry"], "num_images_per_prompt": 2}
    for seed in (5, [1, 2, 3, 4], None):
        result = tiny_runtime(**words, seed=seed, guidance_scale=3.0, pag_scale=1.5, complex_human_instruction=["draw "], **SMALL)
        assert [document["request"]["prompt"] for document in result.metadata] == ["a cat", "a cat", "a dog", "a dog"]
        assert [document["request"]["negative_prompt"] for document in result.metadata] == ["ugly", "ugly", "blurry", "blurry"]
        for image, document in zip(result.images, result.metadata, strict=True):
            np.testing.assert_array_equal(drawn_again(tiny_runtime, document), np.asarray(image))


@pytest.mark.parametrize(
    "words",
    [
        {"scheduler": "euler"},
        {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}},
        {"scheduler": "euler", "sigmas": [1.0, 0.6, 0.2], "num_inference_steps": None},
        {"guidance_interval": (0.0, 0.5), "pag_scale": 1.0, "pag_interval": [0.5, 1]},
    ],
    ids=str,
)
def test_schedulers_steps_and_intervals_are_drawn_again(tiny_runtime: SanaRuntime, words: dict[str, Any]) -> None:
    result = tiny_runtime("a cat", seed=3, **{**SMALL, **words})
    (document,) = result.metadata
    np.testing.assert_array_equal(drawn_again(tiny_runtime, document), np.asarray(result.images[0]))
    other = tiny_runtime("a cat", seed=3, **SMALL).images[0]
    assert not np.array_equal(np.asarray(other), np.asarray(result.images[0]))
    assert document["steps"] == (3 if "sigmas" in words else 2)


def test_none_is_kept_where_it_is_not_the_default(tiny_runtime: SanaRuntime) -> None:
    """An instruction would change the image; None turns it off."""
    result = tiny_runtime("a cat", seed=3, complex_human_instruction=None, **SMALL)
    (document,) = result.metadata
    assert document["request"]["complex_human_instruction"] is None
    np.testing.assert_array_equal(drawn_again(tiny_runtime, document), np.asarray(result.images[0]))
    words = metadata._words(Request("a", intermediate_timesteps=None, height=None))
    assert words.plain == {"prompt": "a", "intermediate_timesteps": None}
    assert metadata._words(Request("a")).plain == {"prompt": "a"}


def test_a_list_of_latents_is_recorded_by_its_hash() -> None:
    words = metadata._words(Request("a", latents=[[[[0.0]]]]))
    assert (set(words.plain), set(words.hashes)) == ({"prompt"}, {"latents"})


def test_a_config_of_a_scheduler_leaks_no_path() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "_name_or_path": "/home/me/Sana"}
    words = metadata._words(Request("a", scheduler=config))
    assert words.plain["scheduler"] == {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}


def test_what_follows_from_the_checkpoint_is_recorded(tiny_runtime: SanaRuntime) -> None:
    (document,) = tiny_runtime("a", num_inference_steps=1, height=64, width=64, use_resolution_binning=False).metadata
    model = tiny_runtime.manifest.model
    assert document["request"]["guidance_scale"] == model.default_guidance_scale
    assert document["model"] == {
        "name": "tiny-random",
        "sha256": tiny_runtime.manifest.checkpoint.sha256,
        "precision": "fp32",
    }
    assert (document["backend"], document["loras"], document["format"]) == ("onnxruntime", [], metadata.FORMAT)
    assert "output_type" not in document["request"]


def test_arrays_are_recorded_by_their_hash(tiny_runtime: SanaRuntime) -> None:
    encoded = tiny_runtime.encode_prompt("a cat")
    latents = np.random.default_rng(0).standard_normal((1, 32, 2, 3)).astype(np.float32)
    one, same, other = (
        tiny_runtime(**encoded.arrays, latents=start, **SMALL).metadata[0] for start in (latents, latents.copy(), latents + 1)
    )
    assert set(one["given"]) == {"latents", *encoded.arrays}
    assert "prompt" not in one["request"]
    assert one["given"] == same["given"]
    assert one["given"]["latents"] != other["given"]["latents"]
    assert len(json.dumps(one)) < 2000


def test_words_that_requests_get_later_are_recorded_by_themselves() -> None:
    """Numbers, texts and lists as they are; images and arrays by their hash."""
    later = {
        "scheduler": "unipc",
        "guidance_interval": (0.0, 0.5),
        "timesteps": np.array([999, 500]),
        "nothing": None,
        "image": Image.new("RGB", (4, 4), "red"),
        "depth": np.zeros((2, 2)),
    }
    made = make_dataclass("Later", [(name, Any, field(default=None)) for name in later], bases=(Request,), frozen=True)
    request = made(prompt="a/b", **later)
    words = metadata._words(request)
    assert {name: value for name, value in words.plain.items() if name in later} == {
        "scheduler": "unipc",
        "guidance_interval": [0.0, 0.5],
        "timesteps": [999, 500],
    }
    assert words.plain["prompt"] == "a/b"
    assert set(words.hashes) == {"image", "depth"}


def test_every_word_of_a_request_is_recorded_or_left_out_on_purpose() -> None:
    values: dict[str, Any] = {item.name: 7 for item in fields(Request) if item.name not in metadata._NOT_RECORDED}

    request = object.__new__(Request)
    for item in fields(Request):
        object.__setattr__(request, item.name, values.get(item.name, item.default))
    words = metadata._words(request)
    assert {*words.plain, *words.hashes, "seed"} == set(values)


def test_loras_are_recorded_with_their_hashes_and_no_path(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    lora = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "secret" / "style", r=4, lora_alpha=7)
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime") as runtime:
        runtime.load_lora(lora, 0.7)
        (document,) = runtime("a", seed=1, **SMALL).metadata
        (recorded,) = document["loras"]
        assert recorded == {"name": "style", "scale": 0.7, "sha256": runtime.loras[0].sha256}
        assert str(tmp_path) not in json.dumps(document)
        runtime.unload_lora()
        assert runtime("a", seed=1, **SMALL).metadata[0]["loras"] == []


def test_a_lora_is_recorded_as_it_was_loaded(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """What happens to an older file afterwards does not matter."""
    first = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "one", r=4, lora_alpha=7)
    second = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "two", r=4, lora_alpha=3)
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime") as runtime:
        runtime.load_lora(first)
        before = runtime("a", seed=1, **SMALL).metadata[0]["loras"]
        shutil.rmtree(first)
        runtime.load_lora(second)
        after = runtime("a", seed=1, **SMALL).metadata[0]["loras"]
        assert after[:1] == before
        assert [lora["name"] for lora in after] == ["one", "two"]


@pytest.mark.parametrize("path", ["/home/me/models/Sana", "C:\\Users\\me\\Sana", "owner/Sana", "Sana", "./Sana/"])
def test_the_last_part_of_a_name_is_kept(path: str) -> None:
    assert metadata.last_name(path) == "Sana"


DOCUMENT: dict[str, Any] = {
    "sana_export": "0.1.0",
    "format": 1,
    "model": {"name": "x", "sha256": "ab"},
    "loras": [],
    "request": {"prompt": "a"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"request": []},
        {"request": 3},
        {"model": {"name": 3, "sha256": "x"}},
        {"model": None},
        {"loras": [{"name": "x"}]},
        {"loras": [{"name": "x", "sha256": "y", "scale": "z"}]},
        {"loras": "x"},
        {"given": [1]},
        {"given": {"latents": 3}},
        {"stream": {"images": 0, "index": 0}},
        {"stream": {"images": 10**9, "index": 0}},
        {"stream": {"images": 2, "index": 2}},
        {"stream": {"images": "2", "index": 0}},
        {"request": {"prompt": "a", "output_type": "np"}},
        {"request": {"prompt": "a", "other": 1}},
        {"request": {"prompt": ["a", "b"]}},
        {"loras": [{"name": "a", "sha256": "b", "scale": 1, "layer_scales": 5}]},
        {"loras": [{"name": "a", "sha256": "b", "scale": 1, "layer_scales": {"x": "y"}}]},
        {"loras": [{"name": "a", "sha256": "b", "scale": 1, "layer_scales": None}]},
        {"loras": [{"name": "a", "sha256": "b", "scale": 10**400}]},
        *({"request": {"prompt": "a", word: "/any/path"}} for word in metadata.GIVEN),
    ],
    ids=str,
)
def test_documents_of_others_are_refused(change: dict[str, Any]) -> None:
    redraw(DOCUMENT, "x.png")
    with pytest.raises(UsageError, match=r"parameters in x\.png"):
        redraw({**DOCUMENT, **change}, "x.png")
