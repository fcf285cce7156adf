"""Where a schedule starts for an image, against diffusers' pipelines and schedulers."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    SanaSprintImg2ImgPipeline,
    SCMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
)
from PIL import Image

from sana_export.errors import UsageError
from sana_export.runtime import Request
from sana_export.runtime.image_start import STRENGTH, first_step
from sana_export.runtime.schedule import SprintAngles, make_schedule
from tests.support.trajectories import FLOW, SHAPE, advance, config_of, difference, no_history

TOLERANCE = 2e-6

#: diffusers passes a tensor to np.array, for which numpy 2 has a warning.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIPELINES = (SanaSprintImg2ImgPipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_the_first_step_is_that_of_diffusers(steps: int) -> None:
    holder = SimpleNamespace(scheduler=SimpleNamespace(timesteps=[*range(steps)], order=1))
    for strength in (0.01, 0.1, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.95, 0.999, 1.0):
        for pipeline in PIPELINES:
            timesteps, count = pipeline.get_timesteps(holder, steps, strength, "cpu")
            assert first_step(steps, strength) == timesteps[0] == steps - count


def test_the_default_strength_is_that_of_diffusers() -> None:
    import inspect

    for pipeline in (*PIPELINES, FluxImg2ImgPipeline):
        assert inspect.signature(pipeline.__call__).parameters["strength"].default == STRENGTH


def scheduler_of(name: str) -> Any:
    return {
        "dpm": lambda: DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
        "dpm, order 1": lambda: DPMSolverMultistepScheduler(**FLOW, flow_shift=6.0, solver_order=1),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "stochastic euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    }[name]()


@pytest.mark.parametrize("name", ["dpm", "dpm, order 1", "euler", "stochastic euler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_every_start_equals_diffusers_step_by_step(name: str, steps: int) -> None:
    """The noised image, every step after it, and the image noised again after every step, as for a mask."""
    for start in range(steps):
        scheduler = scheduler_of(name)
        schedule = make_schedule(config_of(scheduler), steps, first=start)
        levels = schedule.sigmas
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(start)
        add_noise = getattr(scheduler, "scale_noise", None) or (lambda init, t, noise, own=scheduler: own.add_noise(init, noise, t))
        generator, their_noise, our_noise = (torch.Generator().manual_seed(seed) for seed in (0, 1, 1))
        image, initial = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        timesteps = scheduler.timesteps[start:]
        assert len(levels) == len(timesteps) + 1 == len(schedule.timesteps) + 1
        theirs = add_noise(image, timesteps[:1].repeat(SHAPE[0]), initial)
        ours, history = (1 - levels[0]) * image.numpy() + levels[0] * initial.numpy(), no_history()
        np.testing.assert_array_equal(ours, theirs.numpy())
        for index, timestep in enumerate(timesteps):
            output = torch.randn(SHAPE, generator=generator)
            options = {"generator": their_noise} if name == "stochastic euler" else {}
            theirs = scheduler.step(output, timestep, theirs, **options, return_dict=False)[0]
            noise = torch.randn(SHAPE, generator=our_noise).numpy() if schedule.needs_noise else np.float32(0)
            ours, history = advance(schedule.coefficients[index], ours, output.numpy(), history, noise)
            assert difference(ours, theirs) < TOLERANCE
            if index + 1 < len(timesteps):
                wanted = add_noise(image, timesteps[index + 1].repeat(SHAPE[0]), initial)
                level = levels[index + 1]
                np.testing.assert_array_equal((1 - level) * image.numpy() + level * initial.numpy(), wanted.numpy())
        assert levels[-1] == 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sprint_starts_on_the_line_between_image_and_noise(steps: int) -> None:
    """cos t * image + sin t * noise, as SanaSprintImg2ImgPipeline starts, in the denoiser's variables."""
    scheduler = SCMScheduler()
    angles = SprintAngles(second=1.3 if steps == 2 else None)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    data = scheduler.config.sigma_data
    image, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for start in range(steps):
        levels = make_schedule(config_of(scheduler), steps, angles, first=start).sigmas
        for level, angle in zip(levels, scheduler.timesteps[start:], strict=True):
            latents = torch.cos(angle) * (image * data) + torch.sin(angle) * (noise * data)
            s = torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))
            wanted = latents / data * torch.sqrt(s**2 + (1 - s) ** 2)
            assert difference((1 - level) * image.numpy() + level * noise.numpy(), wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("words", "message", "found"),
    [
        ({"strength": 0.0}, "strength is out of range", "0"),
        ({"strength": -0.1}, "strength is out of range", "-0.1"),
        ({"strength": 1.01}, "strength is out of range", "1.01"),
        ({"strength": float("nan")}, "strength is out of range", "nan"),
        ({"strength": "half"}, "strength is not a number", "half"),
        ({"strength": 0.5, "image": None}, "strength has no meaning without an image", "no image"),
        ({"mask": np.zeros((8, 8)), "image": None}, "mask has no meaning without an image", "no image"),
        ({"latents": np.zeros((1, 32, 3, 5), np.float32)}, "image and latents cannot be combined", "both"),
        ({"image": "no-such-file.png"}, "there is no image no-such-file.png", "no such file"),
        ({"mask": "no-such-file.png"}, "there is no image no-such-file.png", "no such file"),
    ],
)
def test_bad_values_are_refused(words: dict[str, Any], message: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        Request("a fox", **{"image": Image.new("RGB", (8, 8)), **words})
    assert caught.value.message == message
    assert found in str(caught.value.found)


def test_a_strength_that_leaves_no_step_is_refused(img2img_runtime: Any) -> None:
    with pytest.raises(UsageError, match="no step remains") as caught:
        img2img_runtime.plan(Request("a fox", image=Image.new("RGB", (8, 8)), strength=1e-20))
    assert caught.value.wanted == "strength 0.05 or more"
    assert caught.value.found == "strength 1e-20 of 20 steps"


def test_the_number_of_images_must_fit(img2img_runtime: Any) -> None:
    three = [Image.new("RGB", (8, 8))] * 3
    for words, name in (({"image": three}, "image"), ({"image": three[0], "mask": three}, "mask")):
        with pytest.raises(UsageError, match=f"number of images in {name}"):
            img2img_runtime.plan(Request(["a fox", "a cat"], **words))


def test_a_start_at_pure_noise_and_a_stretched_image_are_said(img2img_runtime: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        img2img_runtime.plan(
            Request("a fox", image=Image.new("RGB", (300, 200)), num_inference_steps=2, height=96, width=96, strength=0.6)
        )
    assert (
        "strength 0.6 starts at pure noise with 2 steps, so the image has no effect: use more steps or --strength 0.5"
        in caplog.text
    )
    assert "stretched to 96x96, as in diffusers; for its own shape: --height 64 --width 96" in caplog.text
