"""Image-to-image and inpainting against diffusers, both in float32 on the same checkpoint and seed.

The references are SanaSprintImg2ImgPipeline, and for other checkpoints a loop in diffusers' components (tests/support/img2img.py).
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from PIL import Image, ImageDraw

from sana_export.errors import ArtifactError, Cancelled, UsageError
from sana_export.export.parity import compare_images
from sana_export.runtime import Request, SanaRuntime
from tests.support.img2img import load_image, sana_from_image, sprint_from_image

PROMPT = "A red fox, ink drawing style 🐼"
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False}
SANA: dict[str, Any] = {**SMALL, "num_inference_steps": 5, "guidance_scale": 4.5}
PIXELS = SMALL["height"] * SMALL["width"]


def picture(seed: int = 0, width: int = 230, height: int = 150) -> Image.Image:
    """Colored noise at several scales."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for side in (3, 9, 40):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 3
    return Image.fromarray(total.astype(np.uint8))


def white_disk(width: int = 230, height: int = 150) -> Image.Image:
    """A mask of another size than the sampled image, with a soft border."""
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 3, height // 5, width * 9 // 10, height), fill=255)
    return mask.resize((width // 2, height // 2), Image.Resampling.BILINEAR)


def pixels(images: Any) -> Any:
    return np.stack([np.asarray(image) for image in images])


def assert_same(found: Any, wanted: np.ndarray) -> None:
    found = pixels(found)
    assert found.shape == wanted.shape
    assert wanted.std() > 20, "the reference is not a flat image"
    parity = compare_images("image", found, wanted, "fp32")
    assert parity.passed, parity


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.6, 0.99, 1.0])
def test_an_image_at_every_strength(img2img_runtime: SanaRuntime, tiny_pipeline: Any, strength: float) -> None:
    result = img2img_runtime(PROMPT, image=picture(), strength=strength, seed=3, **SANA)
    assert len(result.timings.denoise) == (5 - int(5 - 5 * strength))
    assert result.timings.vae_encoder > 0
    wanted = sana_from_image(tiny_pipeline, PROMPT, load_image(picture()), strength=strength, seed=3, **SANA)
    assert_same(result.images, wanted)


def test_an_image_without_guidance_in_a_bin(img2img_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    """Requested at a size that is not sampled. The image is stretched to the bin, and what is drawn is cropped from it."""
    options = {"height": 150, "width": 280, "num_inference_steps": 2, "guidance_scale": 1.0, "use_resolution_binning": True}
    model = dataclasses.replace(img2img_runtime.manifest.model, sample_size=32)
    before, img2img_runtime.manifest = img2img_runtime.manifest, dataclasses.replace(img2img_runtime.manifest, model=model)
    try:
        result = img2img_runtime(PROMPT, image=picture(), strength=0.5, seed=3, **options)
    finally:
        img2img_runtime.manifest = before
    assert_same(result.images, sana_from_image(tiny_pipeline, PROMPT, picture(), strength=0.5, seed=3, **options))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_mask(img2img_runtime: SanaRuntime, tiny_pipeline: Any, strength: float) -> None:
    options = {"strength": strength, "seed": 5, **SANA}
    result = img2img_runtime(PROMPT, image=picture(), mask=white_disk(), **options)
    wanted = sana_from_image(tiny_pipeline, PROMPT, picture(), mask=load_image(white_disk()), **options)
    assert_same(result.images, wanted)
    other = img2img_runtime(PROMPT, image=picture(), **options)
    assert np.abs(pixels(result.images).astype(int) - pixels(other.images)).max() > 30


def test_a_black_mask_keeps_the_encoded_image(img2img_runtime: SanaRuntime) -> None:
    request = Request(PROMPT, image=picture(), mask=np.zeros((8, 8), np.uint8), strength=0.7, seed=1, output_type="latent", **SANA)
    plan = img2img_runtime.plan(request)
    found = img2img_runtime(
        PROMPT, image=picture(), mask=np.zeros((8, 8), np.uint8), strength=0.7, seed=1, output_type="latent", **SANA
    )
    np.testing.assert_array_equal(found.images, img2img_runtime.encode_image(plan))


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (2, 0.6), (4, 0.6), (1, 1.0)])
def test_sprint_from_an_image(sprint_img2img_runtime: SanaRuntime, sprint_pipeline: Any, steps: int, strength: float) -> None:
    options = {**SMALL, "strength": strength, "num_inference_steps": steps}
    result = sprint_img2img_runtime(PROMPT, image=picture(), seed=7, **options)
    angle = {} if steps == 2 else {"intermediate_timesteps": None}
    wanted = sprint_from_image(sprint_pipeline, PROMPT, picture(), seed=7, **options, **angle)
    assert_same(result.images, wanted)


def test_sprint_in_a_bin_with_the_defaults(sprint_img2img_runtime: SanaRuntime, sprint_pipeline: Any) -> None:
    options = {"height": 150, "width": 280}
    result = sprint_img2img_runtime(PROMPT, image=picture(), seed=2, **options)
    assert_same(result.images, sprint_from_image(sprint_pipeline, PROMPT, picture(), seed=2, **options))


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (4, 0.8)])
def test_sprint_with_a_mask(sprint_img2img_runtime: SanaRuntime, sprint_pipeline: Any, steps: int, strength: float) -> None:
    options = {**SMALL, "strength": strength, "num_inference_steps": steps}
    angle = {} if steps == 2 else {"intermediate_timesteps": None}
    wanted = sprint_from_image(sprint_pipeline, PROMPT, picture(), mask=load_image(white_disk()), seed=7, **options, **angle)
    for callback in (None, lambda *_: {}):
        result = sprint_img2img_runtime(
            PROMPT, image=picture(), mask=white_disk(), seed=7, callback_on_step_end=callback, **options
        )
        assert_same(result.images, wanted)


def test_sprint_keeps_what_the_mask_protects_when_it_is_interrupted(sprint_img2img_runtime: SanaRuntime) -> None:
    options = {**SMALL, "strength": 1.0, "num_inference_steps": 4, "seed": 1, "output_type": "latent"}

    def stop(runtime: Any, *_: Any) -> dict[str, Any]:
        runtime._interrupt = True
        return {}

    mask = np.zeros((96, 160), np.uint8)
    mask[:, 64:] = 255
    given = {"image": picture(), "mask": mask}
    found = sprint_img2img_runtime(PROMPT, callback_on_step_end=stop, **given, **options).images
    image = sprint_img2img_runtime.encode_image(sprint_img2img_runtime.plan(Request(PROMPT, **given, **options)))
    np.testing.assert_array_equal(found[..., :2], image[..., :2])
    assert np.abs(found[..., 2:] - image[..., 2:]).max() > 0.5


def test_the_images_of_several_prompts(img2img_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    """One image for each prompt: its drawn images stand together, unlike in diffusers, which pairs them with other prompts."""
    options = {**SANA, "num_inference_steps": 3, "strength": 0.7}
    prompts, images = ["a red fox", "一只熊猫"], [picture(1), picture(2, 90, 90)]
    result = img2img_runtime(prompts, image=images, num_images_per_prompt=2, seed=[1, 2, 3, 4], **options)
    for index, found in enumerate(result.images):
        wanted = sana_from_image(tiny_pipeline, prompts[index // 2], images[index // 2], seed=index + 1, **options)
        assert_same([found], wanted)
    every = img2img_runtime("a red fox", image=[*images, picture(3)], mask=white_disk(), num_images_per_prompt=3, seed=4, **options)
    one = img2img_runtime("a red fox", image=picture(3), mask=white_disk(), num_images_per_prompt=3, seed=4, **options)
    assert_same([every.images[2]], pixels([one.images[2]]))


def test_the_order_of_the_solver_from_a_later_step(img2img_bundle: Path, tiny_checkpoint: Any) -> None:
    """The same with the scheduler FlowMatchEulerDiscreteScheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = SanaPipeline.from_pretrained(tiny_checkpoint.folder, scheduler=scheduler)
    with SanaRuntime.from_pretrained(img2img_bundle, backend="onnxruntime") as runtime:
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        runtime.manifest = dataclasses.replace(
            runtime.manifest, model=dataclasses.replace(runtime.manifest.model, scheduler=config)
        )
        options = {**SANA, "num_inference_steps": 3, "strength": 0.7, "seed": 3}
        result = runtime(PROMPT, image=picture(), mask=white_disk(), **options)
    wanted = sana_from_image(pipeline, PROMPT, picture(), mask=load_image(white_disk()), **options)
    assert_same(result.images, wanted)


@pytest.mark.parametrize("tile", [32, 64])
def test_tiles_change_nothing(img2img_runtime: SanaRuntime, tile: int) -> None:
    requests = [Request(PROMPT, image=picture(), decoder_tile=side, **SANA) for side in (0, tile)]
    whole, tiled = (img2img_runtime.encode_image(img2img_runtime.plan(request)) for request in requests)
    assert np.abs(tiled - whole).max() <= 1e-5 * np.abs(whole).max()
    plan = img2img_runtime.plan(requests[1])
    assert plan.image_graphs == ("vae_encoder_head", "vae_encoder_tail")


def test_a_staged_runtime_draws_the_same_image(img2img_bundle: Path, img2img_runtime: SanaRuntime) -> None:
    options = {"image": picture(), "mask": white_disk(), "strength": 0.5, "seed": 2, **SANA}
    wanted = img2img_runtime(PROMPT, **options).images
    with SanaRuntime.from_pretrained(img2img_bundle, backend="onnxruntime", memory="staged") as runtime:
        found = runtime(PROMPT, **options).images
        assert set(runtime.sessions) == {"vae_decoder", "postprocess"}
    np.testing.assert_array_equal(pixels(found), pixels(wanted))


def test_the_four_calls_draw_the_same_image(img2img_runtime: SanaRuntime) -> None:
    options = {"image": picture(), "mask": white_disk(), "seed": 2, **SANA}
    plan = img2img_runtime.plan(Request(PROMPT, **options))
    *_, last = img2img_runtime.steps(plan, img2img_runtime.encode(plan))
    np.testing.assert_array_equal(
        pixels(img2img_runtime.decode(plan, last.latents)), pixels(img2img_runtime(PROMPT, **options).images)
    )
    text = img2img_runtime.encode(img2img_runtime.plan(Request(PROMPT, **SANA)))
    with pytest.raises(UsageError, match="belongs to another plan") as caught:
        next(img2img_runtime.steps(plan, text))
    assert caught.value.found == "no encoded image"
    with pytest.raises(UsageError, match="no image"):
        img2img_runtime.encode_image(img2img_runtime.plan(Request(PROMPT, **SANA)))


def test_a_call_can_be_cancelled_between_tiles(img2img_runtime: SanaRuntime) -> None:
    event, calls = threading.Event(), []

    def cancelled() -> bool:
        calls.append(1)
        return len(calls) > 4  # at first: the call, its turn, two tiles

    with pytest.raises(Cancelled):
        img2img_runtime(PROMPT, image=picture(), decoder_tile=32, cancelled=cancelled, **SANA)
    assert not event.is_set()
    assert len(calls) == 5


def test_a_bundle_without_the_graphs(tiny_bundle: Path, tiny_runtime: SanaRuntime) -> None:
    with pytest.raises(ArtifactError, match="without the graphs of image-to-image") as caught:
        tiny_runtime(PROMPT, image=picture(), mask=white_disk(), **SANA)
    assert caught.value.found == "no vae_encoder, blend"
    assert caught.value.fix == (
        f"sana-export export tiny-random -o {tiny_bundle} --dtype fp32 --pag-layers transformer_blocks.1 --graphs default,img2img"
    )
