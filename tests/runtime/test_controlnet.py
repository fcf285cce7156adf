"""A ControlNet in the runtime against diffusers' SanaControlNetPipeline, both in float32 on the same checkpoint and seed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaControlNetPipeline, SanaPAGPipeline
from PIL import Image

from sana_export.cli.main import main
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.parity import compare_images
from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.profiles import Profile
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.backends.base import BackendSettings
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.runtime.control import residuals_shape
from sana_export.runtime.guidance import Branches
from sana_export.trt.compatibility import Host
from sana_export.verify.overlays import load_controlnet
from tests.support.bundles import PAG_LAYER
from tests.support.controlnet import ALIAS, controlled
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

PROMPT = "A red fox, ink drawing style 🐼"
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 4}
HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")
WIDE = Profile("wide", (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512)))


@pytest.fixture(scope="module")
def runtime(controlnet_bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(controlnet_bundle, backend="onnxruntime")


@pytest.fixture(scope="module")
def controlnet(controlnet_checkpoint: Any) -> Any:
    return load_controlnet(controlnet_checkpoint, torch.float32)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Any, controlnet: Any) -> Any:
    made = SanaControlNetPipeline(**tiny_pipeline.components, controlnet=controlnet)
    made.set_progress_bar_config(disable=True)
    return made


def edges(seed: int = 0, width: int = 230, height: int = 150) -> Image.Image:
    """White shapes on black, of another size than the sampled image."""
    coarse = np.random.default_rng(seed).integers(0, 2, (9, 13), dtype=np.uint8) * 255
    return Image.fromarray(coarse).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)


def generators(seeds: Any) -> Any:
    if isinstance(seeds, int):
        return torch.Generator("cpu").manual_seed(seeds)
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def pixels(images: Any) -> Any:
    return np.stack([np.asarray(image) for image in images])


def assert_same(found: Any, wanted: Any) -> None:
    found, wanted = pixels(found), pixels(wanted)
    assert found.shape == wanted.shape
    assert wanted.std() > 20, "the reference is not a flat image"
    parity = compare_images("image", found, wanted, "fp32")
    assert parity.passed, parity


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 4.5},
        {"guidance_scale": 1.0, "controlnet_conditioning_scale": 0.4},
        {"guidance_scale": 4.5, "controlnet_conditioning_scale": 1.7, "negative_prompt": "blurry"},
        {"guidance_scale": 3.0, "prompt": [PROMPT, "a house"], "control_image": [edges(1), edges(2)], "seed": [4, 5]},
        {"guidance_scale": 3.0, "num_images_per_prompt": 2, "seed": [4, 5], "num_inference_steps": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_equals_diffusers(runtime: SanaRuntime, pipeline: Any, options: dict[str, Any]) -> None:
    options = {"prompt": PROMPT, "control_image": edges(), "seed": 3, **SMALL, **options}
    found = runtime(**options).images
    seed = options.pop("seed")
    assert_same(found, pipeline(**options, generator=generators(seed)).images)


def test_a_control_image_changes_the_picture_and_its_absence_does_not(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, tiny_pipeline: Any
) -> None:
    plain = runtime(PROMPT, seed=3, guidance_scale=4.5, **SMALL).images
    assert_same(plain, tiny_pipeline(PROMPT, guidance_scale=4.5, generator=generators(3), **SMALL).images)
    assert_same(plain, tiny_runtime(PROMPT, seed=3, guidance_scale=4.5, **SMALL).images)
    drawn = runtime(PROMPT, control_image=edges(), seed=3, guidance_scale=4.5, **SMALL).images
    assert np.abs(pixels(drawn).astype(int) - pixels(plain)).mean() > 5


def test_with_perturbed_attention(runtime: SanaRuntime, pipeline: Any, controlnet: Any) -> None:
    """diffusers has no such pipeline: SanaPAGPipeline, whose transformer gets the residuals of every branch."""
    options = {**SMALL, "guidance_scale": 4.5, "pag_scale": 2.0}
    found = runtime(PROMPT, control_image=edges(), seed=3, **options).images
    parts = {name: part for name, part in pipeline.components.items() if name != "controlnet"}
    reference = SanaPAGPipeline(**parts, pag_applied_layers=[rf"^{PAG_LAYER}\.attn1$".replace(".", r"\.", 1)])
    reference.set_progress_bar_config(disable=True)
    image = pipeline.image_processor.preprocess(edges(), height=SMALL["height"], width=SMALL["width"])
    with (
        torch.no_grad(),
        controlled(reference, controlnet, pipeline.vae.encode(image).latent * pipeline.vae.config.scaling_factor, 1.0),
    ):
        assert_same(found, reference(PROMPT, generator=generators(3), **options).images)


def test_a_control_image_in_a_bin_and_in_tiles(runtime: SanaRuntime, pipeline: Any) -> None:
    options = {**SMALL, "height": 128, "width": 192, "guidance_scale": 1.0}
    wanted = pipeline(PROMPT, control_image=edges(), generator=generators(3), **options).images
    assert_same(runtime(PROMPT, control_image=edges(), seed=3, decoder_tile=64, **options).images, wanted)


def test_from_an_image_too(runtime: SanaRuntime) -> None:
    """A control image and an image to start from: each has its effect."""
    options: dict[str, Any] = {**SMALL, "seed": 3, "guidance_scale": 1.0, "image": edges(7), "strength": 0.5}
    both = runtime(PROMPT, control_image=edges(), **options)
    alone = runtime(PROMPT, **options)
    assert len(both.timings.denoise) == len(alone.timings.denoise) == 2
    assert np.abs(pixels(both.images).astype(int) - pixels(alone.images)).mean() > 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pag_scale": 2.0},
        {"guidance_interval": (0.25, 0.75)},
        {"image": edges(7), "mask": edges(8), "strength": 0.7},
        {"control_image": None},
    ],
    ids=["cfg", "pag", "interval", "inpainting", "no control"],
)
def test_captured_steps(runtime: SanaRuntime, controlnet_bundle: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The loop that is captured as a CUDA graph, on the stand-in for a GPU, against the one that waits for each session."""
    copy = shutil.copytree(controlnet_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE)
    device = HostDevice()

    def backend(folder: Path, manifest: Manifest) -> TensorRTBackend:
        module = HostTensorRT(device)
        return TensorRTBackend(folder, manifest, "tensorrt-rtx", BackendSettings(), module=module, device=device, machine=HERE)

    options = {"control_image": edges(), "guidance_scale": 4.5, "output_type": "latent", **SMALL, **options}
    with SanaRuntime.from_pretrained(copy, backend=backend) as captured:
        for seed, prompt in ((3, PROMPT), (4, "a house")):
            found, wanted = (one(prompt, seed=seed, **options).images for one in (captured, runtime))
            assert np.abs(wanted).max() > 1
            np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert device.captures == (3 if "guidance_interval" in options else 1)


def test_staged(runtime: SanaRuntime, controlnet_bundle: Path) -> None:
    options = {"control_image": edges(), "seed": 3, **SMALL}
    with SanaRuntime.from_pretrained(controlnet_bundle, backend="onnxruntime", memory="staged") as staged:
        assert_same(staged(PROMPT, **options).images, runtime(PROMPT, **options).images)


def test_a_bundle_without_a_controlnet(img2img_runtime: SanaRuntime) -> None:
    with pytest.raises(ArtifactError, match="exported without a ControlNet") as caught:
        img2img_runtime(PROMPT, control_image=edges(), **SMALL)
    assert f"--controlnet {ALIAS}" in str(caught.value.fix)
    assert "--graphs default,control,img2img" in str(caught.value.fix)
    assert "controlnet_context, controlnet" in str(caught.value.found)


def test_sprint_has_no_controlnets(sprint_runtime: SanaRuntime) -> None:
    with pytest.raises(UsageError, match="SANA-Sprint checkpoint, which has no ControlNets"):
        sprint_runtime(PROMPT, control_image=edges(), height=96, width=160, use_resolution_binning=False)


def test_shapes_of_a_foreign_manifest(controlnet_bundle: Path) -> None:
    manifest = Manifest.load(controlnet_bundle)
    branches = Branches(("uncond", "cond"))
    assert residuals_shape(manifest, (3, 32, 4, 5), branches) == (2, 2, 3, 4, 5, 128)
    entry = manifest.graphs["denoiser"]
    for shape in ((10**9, "text_branches", "batch", "latent_height", "latent_width", 128), ("x", 2, 3, 4, 5, "y"), (2, 3)):
        inputs = tuple(replace(tensor, shape=shape) if tensor.name == "residuals" else tensor for tensor in entry.spec.inputs)
        graphs = {**manifest.graphs, "denoiser": replace(entry, spec=replace(entry.spec, inputs=inputs))}
        with pytest.raises(ArtifactError, match="another denoiser"):
            residuals_shape(replace(manifest, graphs=graphs), (3, 32, 4, 5), branches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_image": None, "controlnet_conditioning_scale": 0.5}, "no meaning without a control image"),
        ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale"),
        ({"controlnet_conditioning_scale": "much"}, "controlnet_conditioning_scale"),
        ({"control_image": "missing.png"}, "there is no image missing.png"),
        ({"control_image": [edges(), edges(), edges()]}, "the number of images in control_image"),
        ({"control_image": 7}, "control_image is not an image"),
    ],
)
def test_bad_input(runtime: SanaRuntime, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        runtime(PROMPT, **{"control_image": edges(), **SMALL, **options})


def test_conditioning_of_another_plan(runtime: SanaRuntime) -> None:
    plain, control = (runtime.plan(Request(PROMPT, control_image=image, **SMALL)) for image in (None, edges()))
    with pytest.raises(UsageError, match="the conditioning belongs to another plan"):
        next(runtime.steps(control, runtime.encode(plain)))
    with pytest.raises(UsageError, match="the conditioning belongs to another plan"):
        next(runtime.steps(plain, runtime.encode(control)))


def test_the_command_line(
    runtime: SanaRuntime, controlnet_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges().save(tmp_path / "edges.png")
    size = ["--height", "96", "--width", "160", "--no-resolution-binning", "--steps", "2", "--seed", "3"]
    control = ["--control-image", str(tmp_path / "edges.png"), "--control-scale", "0.7"]
    output = tmp_path / "fox.png"
    assert main(["generate", str(controlnet_bundle), PROMPT, "-o", str(output), *size, *control, "--backend", "onnxruntime"]) == 0
    options = {**SMALL, "num_inference_steps": 2, "controlnet_conditioning_scale": 0.7}
    wanted = runtime(PROMPT, control_image=edges(), seed=3, **options)
    assert np.array_equal(pixels(wanted.images)[0], np.asarray(Image.open(output)))


def test_conditioning_of_another_size(runtime: SanaRuntime) -> None:
    """On a GPU, a buffer of another size would be read beyond its end."""
    small, large = ({**SMALL, "height": side, "width": side} for side in (64, 96))
    for words in ({"control_image": edges()}, {"image": edges(), "strength": 0.5}):
        conditioning = runtime.encode(runtime.plan(Request(PROMPT, **words, **small)))
        with pytest.raises(UsageError, match="the conditioning belongs to another plan") as caught:
            next(runtime.steps(runtime.plan(Request(PROMPT, **words, **large)), conditioning))
        assert "[1, 32, 2, 2]" in str(caught.value.found)
        assert "[1, 32, 3, 3]" in str(caught.value.wanted)
