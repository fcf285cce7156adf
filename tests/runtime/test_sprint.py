"""SANA-Sprint in the runtime against diffusers' SanaSprintPipeline, both in float32 on the same checkpoint."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import SanaSprintPipeline

from sana_export.errors import UsageError
from sana_export.export.parity import compare_images
from sana_export.runtime import Request, SanaResult, SanaRuntime
from sana_export.runtime.schedule import SPRINT_INTERMEDIATE_TIMESTEP, SPRINT_MAX_TIMESTEP

PROMPTS = {"English": "A red fox, ink drawing style", "Chinese": "一只可爱的熊猫在吃竹子", "emoji": "🐼🎋", "empty": ""}
#: A small size that is not square, without binning.
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False}
#: Defaults of SanaSprintPipeline for the parameters of the runtime and of the schedule.
DEFAULTS = inspect.signature(SanaSprintPipeline.__call__).parameters


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def pixels(images: Any) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])


def assert_same_images(result: SanaResult, wanted: Any) -> None:
    found, wanted = pixels(result.images), pixels(wanted)
    assert found.shape == wanted.shape == (len(wanted), result.height, result.width, 3)
    assert wanted.std() > 20, "the reference is not a flat image"
    parity = compare_images("image", found, wanted, "fp32")
    assert parity.passed, parity


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_kind_of_prompt(sprint_runtime: SanaRuntime, sprint_pipeline: Any, prompt: str) -> None:
    """With the defaults of both: two steps and guidance 4.5."""
    result = sprint_runtime(prompt, seed=7, **SMALL)
    assert len(result.timings.denoise) == 2
    assert_same_images(result, sprint_pipeline(prompt, generator=generators(7), **SMALL).images)


@pytest.mark.parametrize("steps", [1, 4])
def test_other_numbers_of_steps(sprint_runtime: SanaRuntime, sprint_pipeline: Any, steps: int) -> None:
    options = {**SMALL, "num_inference_steps": steps}
    result = sprint_runtime("一只熊猫 🐼", seed=3, **options)
    wanted = sprint_pipeline("一只熊猫 🐼", generator=generators(3), intermediate_timesteps=None, **options)
    assert_same_images(result, wanted.images)


@pytest.mark.parametrize("guidance_scale", [-1.0, 0.0, 1.0, 8.0])
def test_every_guidance_scale_reaches_the_denoiser(
    sprint_runtime: SanaRuntime, sprint_pipeline: Any, guidance_scale: float
) -> None:
    options = {**SMALL, "guidance_scale": guidance_scale}
    result = sprint_runtime("a red fox", seed=5, **options)
    assert_same_images(result, sprint_pipeline("a red fox", generator=generators(5), **options).images)
    other = sprint_runtime("a red fox", seed=5, **{**SMALL, "guidance_scale": guidance_scale + 2.0})
    assert np.abs(pixels(result.images).astype(int) - pixels(other.images)).max() > 10


def test_several_prompts_and_a_seed_for_each_image(sprint_runtime: SanaRuntime, sprint_pipeline: Any) -> None:
    """Prompts of different lengths. Each image draws its noise from its own generator, at the start and at every step."""
    prompts = ["a red fox", "A cute 🐼 eating 🎋, 水墨画 style"]
    result = sprint_runtime(prompts, seed=[1, 2], **SMALL)
    assert_same_images(result, sprint_pipeline(prompts, generator=generators(1, 2), **SMALL).images)
    one = sprint_runtime(prompts[0], num_images_per_prompt=2, seed=9, **SMALL)
    assert_same_images(one, sprint_pipeline(prompts[0], num_images_per_prompt=2, generator=generators(9)[0], **SMALL).images)


def test_latents_from_the_caller(sprint_runtime: SanaRuntime, sprint_pipeline: Any) -> None:
    """The generator then only gives the noise of the steps."""
    latents = torch.randn(1, 32, 3, 5, generator=torch.Generator().manual_seed(11))
    result = sprint_runtime("a fox", latents=latents.numpy(), seed=4, **SMALL)
    assert_same_images(result, sprint_pipeline("a fox", latents=latents, generator=generators(4), **SMALL).images)


def test_resolution_binning(sprint_runtime: SanaRuntime, sprint_pipeline: Any) -> None:
    """Sampled in a bin of the 1024 px table, then resized to the requested size."""
    options = {"height": 150, "width": 280}
    plan = sprint_runtime.plan(Request("a fox", **options))
    assert plan.latents_shape == (1, 32, 22, 42)
    result = sprint_runtime("a fox", seed=2, **options)
    assert_same_images(result, sprint_pipeline("a fox", generator=generators(2), **options).images)


def test_the_defaults_are_those_of_diffusers(sprint_runtime: SanaRuntime) -> None:
    plan = sprint_runtime.plan(Request("a fox"))
    assert len(plan.schedule.timesteps) == DEFAULTS["num_inference_steps"].default
    assert plan.guidance is not None
    assert plan.guidance.tolist() == [DEFAULTS["guidance_scale"].default]
    assert (plan.output_height, plan.output_width) == (DEFAULTS["height"].default, DEFAULTS["width"].default)
    assert plan.max_sequence_length == DEFAULTS["max_sequence_length"].default
    assert plan.texts == ((("a fox",), "\n".join(DEFAULTS["complex_human_instruction"].default)),)
    assert Request("a fox").max_timesteps == DEFAULTS["max_timesteps"].default
    assert Request("a fox").intermediate_timesteps == DEFAULTS["intermediate_timesteps"].default
    instruction = DEFAULTS["complex_human_instruction"].default
    assert sprint_runtime.manifest.model.instruction == "\n".join(instruction)
    assert DEFAULTS["max_timesteps"].default == SPRINT_MAX_TIMESTEP
    assert DEFAULTS["intermediate_timesteps"].default == SPRINT_INTERMEDIATE_TIMESTEP


def test_any_guidance_runs_one_branch(sprint_runtime: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    plan = sprint_runtime.plan(Request("a fox", guidance_scale=6.0, num_inference_steps=3))
    np.testing.assert_array_equal(plan.guidance_weights, np.ones((3, 1), dtype=np.float32))
    np.testing.assert_array_equal(plan.branches.perturbed, np.zeros(1, dtype=np.float32))
    assert tiny_runtime.plan(Request("a fox", guidance_scale=6.0)).guidance is None


@pytest.mark.parametrize("negative_prompt", ["blurry", ["", "blurry"]])
def test_a_negative_prompt_is_refused(sprint_runtime: SanaRuntime, negative_prompt: Any) -> None:
    with pytest.raises(UsageError, match="no negative_prompt") as caught:
        sprint_runtime.plan(Request(["a fox", "a cat"], negative_prompt=negative_prompt))
    assert "blurry" in str(caught.value.found)
    assert "--negative-prompt" in str(caught.value.fix)
    sprint_runtime.plan(Request(["a fox", "a cat"], negative_prompt=["", ""]))


def test_perturbed_attention_is_refused(sprint_runtime: SanaRuntime) -> None:
    with pytest.raises(UsageError, match="no pag_scale") as caught:
        sprint_runtime.plan(Request("a fox", pag_scale=2.0))
    assert "2.0" in str(caught.value.found)
    assert "--pag-scale" in str(caught.value.fix)
