"""The runtime with ONNX Runtime against diffusers' pipelines, both in float32 on the same checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPAGPipeline, SanaPipeline

from sana_export.contract import COEFFICIENTS
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.parity import compare_images
from sana_export.runtime import Request, SanaResult, SanaRuntime
from tests.support.bundles import PAG_LAYER

PROMPTS = {
    "English": "A red fox, ink drawing style",
    "Chinese": "一只可爱的熊猫在吃竹子",
    "emoji": "🐼🎋",
    "mixed": "A cute 🐼 eating 🎋, 水墨画 style",
    "empty": "",
    "long": "a very detailed painting of a house by the lake, " * 60,
}
#: A small size that is not square, in few steps.
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
#: Latents reach about 10; this is the rounding difference between two orders of float32 summation.
LATENT_TOLERANCE = 2e-4


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def pixels(images: Any) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])


def assert_same_images(result: SanaResult, wanted: Any) -> None:
    found, wanted = pixels(result.images), pixels(wanted)
    assert found.shape == wanted.shape == (len(wanted), result.height, result.width, 3)
    assert wanted.std() > 20, "the reference is not a flat image"
    parity = compare_images("image", found, wanted, "fp32")
    assert parity.passed, parity


def assert_same_latents(found: Any, wanted: Any) -> None:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.abs(found - np.asarray(wanted)).max() < LATENT_TOLERANCE


@pytest.fixture(scope="session")
def pag_pipeline(tiny_pipeline: Any) -> Any:
    pipeline = SanaPAGPipeline(**tiny_pipeline.components, pag_applied_layers=PAG_LAYER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_kind_of_prompt(tiny_runtime: SanaRuntime, tiny_pipeline: Any, prompt: str, guidance_scale: float) -> None:
    options = {**SMALL, "guidance_scale": guidance_scale}
    result = tiny_runtime(prompt, seed=7, **options)
    assert_same_images(result, tiny_pipeline(prompt, generator=generator(7), **options).images)
    assert result.seeds == (7,)
    assert len(result.timings.denoise) == 3
    assert result.timings.total >= sum(result.timings.denoise) + result.timings.vae_decoder


@pytest.mark.parametrize("pag_adaptive_scale", [0.0, 0.004])
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_perturbed_attention_guidance(
    tiny_runtime: SanaRuntime, pag_pipeline: Any, guidance_scale: float, pag_adaptive_scale: float
) -> None:
    options = {
        **SMALL,
        "guidance_scale": guidance_scale,
        "pag_scale": 2.0,
        "pag_adaptive_scale": pag_adaptive_scale,
        "negative_prompt": "blue",
    }
    result = tiny_runtime(PROMPTS["mixed"], seed=3, **options)
    assert_same_images(result, pag_pipeline(PROMPTS["mixed"], generator=generator(3), **options).images)
    without = tiny_runtime(PROMPTS["mixed"], seed=3, **{**options, "pag_scale": 0.0})
    assert np.abs(pixels(result.images).astype(int) - pixels(without.images)).max() > 10


def test_the_defaults_are_those_of_diffusers(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    """Native size, binning and guidance. Only the number of steps is below the default 20."""
    result = tiny_runtime("a red fox", seed=1, num_inference_steps=2)
    wanted = tiny_pipeline("a red fox", generator=generator(1), num_inference_steps=2, height=512, width=512).images
    assert_same_images(result, wanted)
    plan = tiny_runtime.plan(Request("a red fox", height=300))
    assert (plan.output_height, plan.output_width) == (300, 512)
    assert len(plan.schedule.timesteps) == 20
    np.testing.assert_array_equal(plan.guidance_weights, np.full((20, 2), [-3.5, 4.5], dtype=np.float32))


@pytest.mark.parametrize(
    ("guidance_scale", "pag_scale", "weights", "perturbed"),
    [
        (1.0, 0.0, [1], [0]),
        (0.0, 0.0, [1], [0]),
        (1.5, 0.0, [-0.5, 1.5], [0, 0]),
        (1.0, 2.0, [3, -2], [0, 1]),
        (4.0, 2.0, [-3, 6, -2], [0, 0, 1]),
    ],
)
def test_only_the_branches_that_guidance_needs_run(
    tiny_runtime: SanaRuntime, guidance_scale: float, pag_scale: float, weights: list[float], perturbed: list[float]
) -> None:
    plan = tiny_runtime.plan(Request("fox", guidance_scale=guidance_scale, pag_scale=pag_scale, num_inference_steps=2))
    np.testing.assert_array_equal(plan.guidance_weights, np.array([weights, weights], dtype=np.float32))
    np.testing.assert_array_equal(plan.branches.perturbed, np.array(perturbed, dtype=np.float32))
    assert len(plan.texts) == len(weights) - sum(perturbed)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (333, 150)])
def test_binning_resizes_and_crops(tiny_runtime: SanaRuntime, tiny_pipeline: Any, height: int, width: int) -> None:
    options: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": 1}
    result = tiny_runtime("a red fox", seed=5, **options)
    assert_same_images(result, tiny_pipeline("a red fox", generator=generator(5), **options).images)
    array = tiny_runtime("a red fox", seed=5, output_type="np", **options).images
    wanted = tiny_pipeline("a red fox", generator=generator(5), output_type="np", **options).images
    assert array.dtype == np.float32
    assert array.shape == wanted.shape == (1, height, width, 3)
    assert np.abs(array - wanted).max() < 1e-4
    assert 0 <= array.min() <= array.max() <= 1


def test_a_batch_of_different_prompts_equals_single_runs(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    """In such a batch diffusers repeats the masks in another order than the embeddings. Its single runs are right."""
    prompts = ["fox", PROMPTS["mixed"], PROMPTS["Chinese"]]
    negatives = ["blurry, bad anatomy, watermark", "", "blue"]
    seeds = [11, 12, 13, 14, 15, 16]
    result = tiny_runtime(prompts, negative_prompt=negatives, num_images_per_prompt=2, seed=seeds, **SMALL)
    assert result.seeds == tuple(seeds)
    wanted = [
        tiny_pipeline(prompts[i // 2], negative_prompt=negatives[i // 2], generator=generator(seed), **SMALL).images[0]
        for i, seed in enumerate(seeds)
    ]
    assert_same_images(result, wanted)


def test_one_seed_is_one_generator_for_the_batch(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    prompts = ["fox", PROMPTS["mixed"]]
    for seed, generators in ((21, generator(21)), ([21, 22], [generator(21), generator(22)])):
        found = tiny_runtime(prompts, seed=seed, output_type="latent", **SMALL).images
        wanted = tiny_pipeline(prompts, generator=generators, output_type="latent", **SMALL).images
        assert_same_latents(found, wanted)


def test_a_random_seed_is_reported_and_reproduces_the_image(tiny_runtime: SanaRuntime) -> None:
    options = {**SMALL, "num_inference_steps": 1, "num_images_per_prompt": 2, "output_type": "latent"}
    first, second = tiny_runtime("fox", **options), tiny_runtime("fox", **options)
    assert first.seeds != second.seeds
    np.testing.assert_array_equal(tiny_runtime("fox", seed=first.seeds, **options).images, first.images)
    assert np.abs(first.images - second.images).max() > 0.1


def test_latents_from_the_caller_are_not_scaled_or_changed(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    latents = torch.randn(2, 32, 3, 5) * 1.3
    options = {**SMALL, "num_images_per_prompt": 2, "output_type": "latent"}
    before = latents.clone()
    found = tiny_runtime("fox", latents=latents.numpy(), **options).images
    assert_same_latents(found, tiny_pipeline("fox", latents=latents, **options).images)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("instruct", [True, False])
def test_text_options(tiny_runtime: SanaRuntime, tiny_pipeline: Any, instruct: bool) -> None:
    lines = tiny_runtime.manifest.model.instruction.split("\n") if instruct else None
    prompts = [PROMPTS["mixed"], PROMPTS["long"][:200]]
    options = {**SMALL, "max_sequence_length": 24, "output_type": "latent"}
    found = tiny_runtime(prompts, seed=2, complex_human_instruction=instruct, **options).images
    wanted = tiny_pipeline(prompts, generator=generator(2), complex_human_instruction=lines, **options).images
    assert_same_latents(found, wanted)


def test_callbacks_see_and_replace_latents(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    replacement = np.random.default_rng(0).normal(size=(1, 32, 3, 5)).astype(np.float32)

    def watcher(seen: list[Any], as_latents: Callable[[Any], Any]) -> Callable[..., dict[str, Any]]:
        def callback(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            seen.append((index, float(timestep), np.asarray(values["latents"]).copy()))
            return {"latents": as_latents(replacement)} if index == 1 else {}

        return callback

    ours: list[Any] = []
    theirs: list[Any] = []
    options = {**SMALL, "num_inference_steps": 4, "output_type": "latent"}
    found = tiny_runtime("fox", seed=4, callback_on_step_end=watcher(ours, np.array), **options).images
    wanted = tiny_pipeline("fox", generator=generator(4), callback_on_step_end=watcher(theirs, torch.from_numpy), **options).images
    assert [step[:2] for step in ours] == [step[:2] for step in theirs]
    for (_, _, mine), (_, _, reference) in zip(ours, theirs, strict=True):
        assert_same_latents(mine, reference)
    assert_same_latents(found, wanted)

    def overwrite(_: Any, index: int, timestep: float, values: dict[str, Any]) -> None:
        values["latents"][:] = 9

    plain = tiny_runtime("fox", seed=4, **options).images
    np.testing.assert_array_equal(tiny_runtime("fox", seed=4, callback_on_step_end=overwrite, **options).images, plain)


def test_the_loop_can_be_driven_by_the_caller(tiny_runtime: SanaRuntime) -> None:
    options = {**SMALL, "seed": 8}
    plan = tiny_runtime.plan(Request("fox", output_type="latent", **options))
    conditioning = tiny_runtime.encode(plan)
    steps = list(tiny_runtime.steps(plan, conditioning))
    assert [step.index for step in steps] == [0, 1, 2]
    last = tiny_runtime.decode(plan, steps[-1].latents)
    np.testing.assert_array_equal(last, tiny_runtime("fox", output_type="latent", **options).images)
    np.testing.assert_array_equal(last, tiny_runtime.backend.to_host(steps[-1].x0))
    # The first step is of first order: the next latents are a combination of the noise and x0.
    row = dict(zip(COEFFICIENTS, plan.schedule.coefficients[0], strict=True))
    noise = torch.randn(1, 32, 3, 5, generator=generator(8)).numpy()
    preview = tiny_runtime.decode(plan, steps[0].x0)
    first = tiny_runtime.decode(plan, steps[0].latents)
    np.testing.assert_allclose(first, row["latents"] * noise + row["x0"] * preview, atol=1e-4)


@pytest.mark.parametrize("stochastic", [False, True])
def test_another_scheduler(
    tiny_runtime: SanaRuntime, tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch, stochastic: bool
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    pipeline = SanaPipeline(**{**tiny_pipeline.components, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    model = dataclasses.replace(tiny_runtime.manifest.model, scheduler=json.loads(scheduler.to_json_string()))
    monkeypatch.setattr(tiny_runtime, "manifest", dataclasses.replace(tiny_runtime.manifest, model=model))
    noise = generator(6)
    # diffusers draws the noise of a step from torch's global generator: make it continue the one of the latents.
    monkeypatch.setattr(torch, "randn_like", lambda sample: torch.randn(sample.shape, generator=noise))
    wanted = pipeline("fox", generator=noise, output_type="latent", **SMALL).images
    assert_same_latents(tiny_runtime("fox", seed=6, output_type="latent", **SMALL).images, wanted)


NAN = np.full((1, 32, 16, 16), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"prompt": []}, ["a str, or a list"]),
        ({"prompt": 3}, ["prompt is not text", "found:  3", "a str, or a list"]),
        ({"prompt": ["a", None]}, ["a str, or a list"]),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, ["1 negative prompts for 2 prompts", "a list of 2"]),
        ({"negative_prompt": 1}, ["negative_prompt is not text", "a str, or a list"]),
        ({"num_inference_steps": 0}, ["num_inference_steps", "from 1 to"]),
        ({"num_inference_steps": 2.5}, ["num_inference_steps is not an integer", "2.5"]),
        ({"guidance_scale": float("nan")}, ["guidance_scale", "from -1000 to 1000"]),
        ({"guidance_scale": "high"}, ["guidance_scale is not a number"]),
        ({"pag_scale": -1}, ["pag_scale", "from 0 to 1000"]),
        ({"pag_adaptive_scale": -1}, ["pag_adaptive_scale", "from 0 to 1000"]),
        ({"height": 0}, ["height", "from 1 to"]),
        ({"width": -64}, ["width", "from 1 to"]),
        ({"width": "wide"}, ["width is not an integer"]),
        ({"height": True}, ["height"]),
        ({"height": 100, "width": 70, "use_resolution_binning": False}, ["multiples of 32", "96x64", "128x96"]),
        ({"num_images_per_prompt": 0}, ["num_images_per_prompt", "from 1 to"]),
        ({"seed": [1, 2]}, ["2 seeds for 1 images", "1 seed"]),
        ({"seed": []}, ["0 seeds for 1 images"]),
        ({"seed": "x"}, ["seed is not an integer"]),
        ({"seed": 2**70}, ["seed is out of range"]),
        ({"latents": np.zeros((1, 32, 16, 8), np.float32)}, ["(1, 32, 16, 8)", "(1, 32, 16, 16)"]),
        ({"latents": NAN}, ["8192 of 8192 values are NaN or infinite"]),
        ({"latents": "noise"}, ["latents are not an array of numbers"]),
        ({"output_type": "png"}, ["unknown output_type 'png'", "pil, np, latent"]),
        ({"max_sequence_length": 0}, ["max_sequence_length", "from 1 to"]),
        ({"max_sequence_length": 5000}, ["max_sequence_length is out of range", "from 1 to 2048"]),
        ({"callback_on_step_end": lambda *_: {"prompt_embeds": 1}}, ["prompt_embeds", '{"latents": array}']),
        ({"callback_on_step_end": lambda *_: 5}, ["found:  int", "None or"]),
        ({"callback_on_step_end": lambda *_: {"latents": NAN}}, ["NaN or infinite"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_an_invalid_request_says_what_is_possible(tiny_runtime: SanaRuntime, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        tiny_runtime(**{"prompt": "fox", "num_inference_steps": 1, **options})
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in str(caught.value)


def test_pag_needs_layers(tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tiny_runtime.manifest
    options = dataclasses.replace(manifest.options, pag_layers=())
    monkeypatch.setattr(tiny_runtime, "manifest", dataclasses.replace(manifest, options=options))
    with pytest.raises(UsageError) as caught:
        tiny_runtime("fox", pag_scale=2.0)
    assert (
        caught.value.fix
        == f"sana-export export tiny-random -o {tiny_runtime.bundle} --dtype fp32 --pag-layers transformer_blocks.8"
    )


def test_infinite_latents_are_an_artifact_error(tiny_runtime: SanaRuntime) -> None:
    with pytest.raises(ArtifactError, match="NaN or infinite") as caught:
        tiny_runtime("fox", latents=np.full((1, 32, 3, 5), 1e38, np.float32), **SMALL)
    assert "with fp32 graphs" in str(caught.value)
    assert caught.value.fix is not None
    assert caught.value.fix.startswith(f"sana-export verify {tiny_runtime.bundle} --reference tiny-random --ranges")


def test_an_image_with_nan_is_an_artifact_error(tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a decoder that overflows, which DC-AE does in a plain fp16 cast."""

    class Broken:
        def run(self, feeds: Any) -> dict[str, Any]:
            return {"image": np.full((1, 3, 64, 64), np.nan, dtype=np.float32)}

    monkeypatch.setitem(tiny_runtime.sessions, "vae_decoder", Broken())
    with pytest.raises(ArtifactError, match="an image with NaN") as caught:
        tiny_runtime("x", height=64, width=64, use_resolution_binning=False, num_inference_steps=1, seed=0)
    assert "--ranges" in str(caught.value.fix)


@pytest.mark.parametrize("size", [{"height": 10**9}, {"width": 16416}])
def test_sizes_above_the_maximum_are_refused(tiny_runtime: SanaRuntime, size: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        tiny_runtime("x", use_resolution_binning=False, **size)


def test_a_prompt_must_be_unicode(tiny_runtime: SanaRuntime) -> None:
    with pytest.raises(UsageError, match=r"^prompt is not Unicode text"):
        tiny_runtime("a \udcff")
    with pytest.raises(UsageError, match=r"^negative_prompt is not Unicode text"):
        tiny_runtime("a", negative_prompt="a \udcff")
