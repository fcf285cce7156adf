"""Guidance in an interval of the steps: which branches run when, and the images against a loop of diffusers' components."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import SanaPAGPipeline

from sana_export.errors import UsageError
from sana_export.export.parity import compare_images
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.guidance import WHOLE, Interval, inside, make_guidance, parts
from tests.support.bundles import PAG_LAYER

SIZE: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False}
STEPS = 10
NEGATIVE = "blue, blurry"
PAG = 2.0


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 1000])
def test_a_step_is_inside_by_its_exact_fraction(steps: int) -> None:
    """A bound that is written as the fraction of a step counts as that step, in spite of rounding."""
    for bound in range(steps + 1):
        assert inside((bound / steps, 1.0), steps).sum() == steps - bound
        assert inside((0.0, bound / steps), steps).sum() == bound
    exact = [Fraction(1, 3) <= Fraction(step, steps) < Fraction(3, 4) for step in range(steps)]
    np.testing.assert_array_equal(inside((1 / 3, 0.75), steps), exact)


def test_the_example_of_the_documents() -> None:
    assert np.flatnonzero(inside((0.2, 0.8), 20)).tolist() == [*range(4, 16)]


@pytest.mark.parametrize(
    ("scale", "pag_scale", "guidance_interval", "pag_interval", "wanted"),
    [
        (4.5, 0.0, WHOLE, WHOLE, [(0, 10, "uc")]),
        (4.5, 0.0, (0.2, 0.8), WHOLE, [(0, 2, "c"), (2, 8, "uc"), (8, 10, "c")]),
        (4.5, 0.0, (0.0, 0.35), WHOLE, [(0, 4, "uc"), (4, 10, "c")]),
        (4.5, 0.0, (0.41, 0.49), WHOLE, [(0, 10, "c")]),
        (4.5, 0.0, (1.0, 1.0), WHOLE, [(0, 10, "c")]),
        (4.5, 2.0, WHOLE, (0.0, 0.5), [(0, 5, "ucp"), (5, 10, "uc")]),
        (4.5, 2.0, (0.5, 1.0), (0.0, 0.5), [(0, 5, "cp"), (5, 10, "uc")]),
        (4.5, 2.0, (0.3, 0.7), (0.5, 0.9), [(0, 3, "c"), (3, 5, "uc"), (5, 7, "ucp"), (7, 9, "cp"), (9, 10, "c")]),
        (1.0, 2.0, WHOLE, (0.5, 1.0), [(0, 5, "c"), (5, 10, "cp")]),
        (4.5, 2.0, (0.3, 0.3), (0.6, 0.6), [(0, 10, "c")]),
    ],
)
def test_segments_and_weights(
    scale: float, pag_scale: float, guidance_interval: Interval, pag_interval: Interval, wanted: list[tuple[int, int, str]]
) -> None:
    timesteps = np.linspace(999, 100, 10, dtype=np.float32)
    found = make_guidance(scale, pag_scale, 0.0, timesteps, guidance_interval, pag_interval)
    letters = {"u": "uncond", "c": "cond", "p": "perturbed"}
    assert [(part.first, part.stop, part.branches.names) for part in found.segments] == [
        (first, stop, tuple(letters[letter] for letter in names)) for first, stop, names in wanted
    ]
    for first, stop, names in wanted:
        g, p = scale if "u" in names else 1.0, pag_scale if "p" in names else 0.0
        row = {"uncond": 1 - g, "cond": g + p, "perturbed": -p}
        np.testing.assert_array_equal(found.weights[first:stop], [[row[name] for name in found.branches.names]] * (stop - first))
    assert sum(part.stop - part.first for part in parts(found.segments, 1, 8)) == 7


def images_of(images: Any) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])


@contextmanager
def perturbed_attention(pipeline: Any, guided: bool) -> Iterator[None]:
    """diffusers' own processors for a step with PAG."""
    before = pipeline.transformer.attn_processors
    pipeline._set_pag_attn_processor(pag_applied_layers=pipeline.pag_applied_layers, do_classifier_free_guidance=guided)
    try:
        yield
    finally:
        pipeline.transformer.set_attn_processor(before)


@torch.no_grad()
def reference(
    runtime: SanaRuntime,
    components: dict[str, Any],
    prompt: str,
    seed: int,
    scales: tuple[float, float],
    intervals: tuple[Interval, Interval],
) -> Any:
    """diffusers' loop with guidance of both kinds, whose scales and intervals are given, switched off outside of its interval."""
    pipeline = SanaPAGPipeline(**components, pag_applied_layers=PAG_LAYER)
    instruction = runtime.manifest.model.instruction.split("\n")
    encoded = pipeline.encode_prompt(prompt, True, negative_prompt=NEGATIVE, complex_human_instruction=instruction)
    (cond, cond_mask), (uncond, uncond_mask) = encoded[:2], encoded[2:]
    pipeline.scheduler.set_timesteps(STEPS)
    shape = (1, 32, SIZE["height"] // 32, SIZE["width"] // 32)
    latents = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    for step, timestep in enumerate(pipeline.scheduler.timesteps):
        guided, perturbed = (
            scale > off and start <= step / STEPS < stop
            for scale, off, (start, stop) in zip(scales, (1, 0), intervals, strict=True)
        )
        texts = torch.cat([uncond] * guided + [cond] * (1 + perturbed))
        masks = torch.cat([uncond_mask] * guided + [cond_mask] * (1 + perturbed))
        with perturbed_attention(pipeline, guided) if perturbed else nullcontext():
            predictions = pipeline.transformer(
                latents.repeat(len(texts), 1, 1, 1),
                encoder_hidden_states=texts,
                encoder_attention_mask=masks,
                timestep=timestep.expand(len(texts)),
            ).sample
        own = predictions[guided : guided + 1]
        noise = predictions[:1] + scales[0] * (own - predictions[:1]) if guided else own
        if perturbed:
            noise = noise + scales[1] * (own - predictions[-1:])
        latents = pipeline.scheduler.step(noise, timestep, latents, return_dict=False)[0]
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(image, output_type="pil")


@contextmanager
def counted_branches(runtime: SanaRuntime) -> Iterator[list[tuple[int, int]]]:
    """K and U of every run of the denoiser."""
    session, seen = runtime.sessions["denoiser"], []
    run = session.run

    def counting(feeds: Any) -> Any:
        seen.append((feeds["perturbed"].shape()[0], feeds["context"].shape()[2]))
        return run(feeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "run", counting)
        yield seen


@pytest.mark.parametrize(
    ("scale", "pag_scale", "guidance", "pag", "branches"),
    [
        (4.5, 0.0, (0.2, 0.8), WHOLE, "1122222211"),
        (4.5, 0.0, (0.0, 0.5), WHOLE, "2222211111"),
        (4.5, PAG, WHOLE, (0.0, 0.3), "3332222222"),
        (4.5, PAG, (0.4, 1.0), (0.0, 0.6), "2222332222"),
        (1.0, PAG, WHOLE, (0.25, 0.75), "1112222211"),
        (4.5, PAG, (0.3, 0.3), (0.9, 1.0), "1111111112"),
    ],
)
def test_images_are_those_of_a_loop_that_switches_guidance_off(
    tiny_runtime: SanaRuntime,
    tiny_pipeline: Any,
    scale: float,
    pag_scale: float,
    guidance: Interval,
    pag: Interval,
    branches: str,
) -> None:
    prompt = "A cute 🐼 eating 🎋, 水墨画 style"
    options = {**SIZE, "num_inference_steps": STEPS, "negative_prompt": NEGATIVE, "seed": 5}
    options |= {"guidance_scale": scale, "pag_scale": pag_scale}
    with counted_branches(tiny_runtime) as seen:
        result = tiny_runtime(prompt, guidance_interval=guidance, pag_interval=pag, **options)
    assert "".join(str(count) for count, _ in seen) == branches
    assert (result.guidance_interval, result.pag_interval) == (guidance, pag)
    wanted = images_of(reference(tiny_runtime, tiny_pipeline.components, prompt, 5, (scale, pag_scale), (guidance, pag)))
    parity = compare_images("image", images_of(result.images), wanted, "fp32")
    assert parity.passed, parity
    assert parity.identical is not None
    assert parity.identical >= 0.999
    whole = images_of(tiny_runtime(prompt, **options).images)
    assert np.abs(whole.astype(int) - wanted).max() > 5


def test_an_interval_that_covers_no_step_is_no_guidance(tiny_runtime: SanaRuntime) -> None:
    """Bit for bit, and the negative prompt is not encoded."""
    options: dict[str, Any] = {**SIZE, "num_inference_steps": 3, "seed": 1}
    request = Request("a red fox", negative_prompt=NEGATIVE, guidance_interval=(0.4, 0.6), **options)
    plan = tiny_runtime.plan(request)
    assert [texts for texts, _ in plan.texts] == [("a red fox",)]
    found = tiny_runtime("a red fox", negative_prompt=NEGATIVE, guidance_interval=(0.4, 0.6), output_type="latent", **options)
    wanted = tiny_runtime("a red fox", guidance_scale=1.0, output_type="latent", **options)
    np.testing.assert_array_equal(found.images, wanted.images)


def test_all_steps_is_the_default(tiny_runtime: SanaRuntime) -> None:
    options: dict[str, Any] = {
        **SIZE,
        "use_resolution_binning": False,
        "num_inference_steps": 3,
        "seed": 1,
        "output_type": "latent",
    }
    found = tiny_runtime("a red fox", guidance_interval=[0, 1], pag_interval=np.array([0.0, 1.0]), **options)
    np.testing.assert_array_equal(found.images, tiny_runtime("a red fox", **options).images)
    assert found.guidance_interval == found.pag_interval == WHOLE


def test_the_perturbed_branch_has_no_context_of_its_own(tiny_runtime: SanaRuntime) -> None:
    options: dict[str, Any] = {**SIZE, "num_inference_steps": 1, "pag_scale": PAG}
    with counted_branches(tiny_runtime) as seen:
        tiny_runtime("a red fox", **options)
        tiny_runtime("a red fox", guidance_scale=1.0, **options)
    assert seen == [(3, 2), (2, 1)]


def test_a_conditioning_without_the_prompts_alone_does_not_fit_an_interval(tiny_runtime: SanaRuntime) -> None:
    options: dict[str, Any] = {**SIZE, "num_inference_steps": 4, "seed": 1}
    plan = tiny_runtime.plan(Request("a red fox", guidance_interval=(0.5, 1), **options))
    whole = tiny_runtime.plan(Request("a red fox", **options))
    with pytest.raises(UsageError, match="belongs to another plan") as caught:
        next(tiny_runtime.steps(plan, tiny_runtime.encode(whole)))
    assert caught.value.wanted == f"{caught.value.found}, in an interval"
    *_, last = tiny_runtime.steps(whole, tiny_runtime.encode(plan))  # the other way round, it does
    assert last.index == 3


@pytest.mark.parametrize("name", ["guidance_interval", "pag_interval"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "is not an interval"),
        (None, "is not an interval"),
        ("01", "is not an interval"),
        ((0.5,), "is not an interval"),
        ((0, 0.5, 1), "is not an interval"),
        (("0", "1"), "is not a number"),
        ((True, 1), "is not a number"),
        ((-0.1, 0.5), "the start of .* is out of range"),
        ((0.5, 1.1), "the stop of .* is out of range"),
        ((math.nan, 0.5), "the start of .* is out of range"),
        ((0.0, math.inf), "the stop of .* is out of range"),
        ((0.8, 0.2), "stops before it starts"),
    ],
)
def test_values_that_are_no_interval(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Request("a red fox", **{name: value})
    assert name in caught.value.message
    assert caught.value.found
    assert caught.value.wanted


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"guidance_interval": (0.2, 0.8), "guidance_scale": 1.0}, "--guidance-scale 4.5, or leave out --guidance-interval"),
        ({"pag_interval": (0.2, 0.8)}, "--pag-scale 2, or leave out --pag-interval"),
    ],
)
def test_an_interval_of_guidance_that_is_off(tiny_runtime: SanaRuntime, options: dict[str, Any], fix: str) -> None:
    with pytest.raises(UsageError, match="has no effect, because this guidance is off") as caught:
        tiny_runtime.plan(Request("a red fox", **options))
    assert caught.value.fix == fix


@pytest.mark.parametrize("name", ["guidance_interval", "pag_interval"])
def test_distilled_guidance_has_no_interval(sprint_runtime: SanaRuntime, name: str) -> None:
    with pytest.raises(UsageError, match=f"accepts no {name}: its guidance is distilled"):
        sprint_runtime.plan(Request("a red fox", **{name: (0.2, 0.8)}))
