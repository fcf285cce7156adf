"""Image-to-image and inpainting in the TensorRT backend, with engines that run the bundle's ONNX files on the host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export.errors import UsageError
from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from tests.runtime.backends.test_tensorrt import SMALL, TOLERANCE, WIDE, opened
from tests.runtime.test_img2img import picture, white_disk
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines


@pytest.fixture(scope="module")
def engines(img2img_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(img2img_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    with_engines(copy, WIDE)
    return copy


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def module(device: HostDevice) -> HostTensorRT:
    return HostTensorRT(device)


def assert_same(runtime: SanaRuntime, reference: SanaRuntime, **options: Any) -> None:
    options = {**SMALL, "seed": 7, "output_type": "latent", **options}
    found, wanted = (one("a red fox", **options).images for one in (runtime, reference))
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_latents_are_those_of_onnxruntime(
    engines: Path, img2img_runtime: SanaRuntime, device: HostDevice, module: HostTensorRT, memory: str
) -> None:
    with opened(engines, device, module, memory=memory) as runtime:
        for options in (
            {"image": picture()},
            {"image": picture(), "mask": white_disk()},
            {"image": picture(1), "mask": np.full((8, 8), 255, np.uint8)},
            {"image": picture(), "strength": 1.0, "mask": white_disk(), "decoder_tile": 64},
            {},
        ):
            assert_same(runtime, img2img_runtime, **options)


def test_a_captured_loop_with_a_mask_serves_other_images_and_masks(
    engines: Path, img2img_runtime: SanaRuntime, device: HostDevice, module: HostTensorRT
) -> None:
    runtime = opened(engines, device, module)
    given = {"image": picture(), "mask": white_disk()}
    assert_same(runtime, img2img_runtime, **given)
    assert (device.captures, device.replays) == (1, 1)
    module.runs.clear()
    assert_same(runtime, img2img_runtime, image=picture(2), mask=picture(3).convert("L"), guidance_scale=3.0)
    assert (device.captures, device.replays) == (1, 2)
    assert "blend" not in module.runs, "it is part of the captured work"
    assert_same(runtime, img2img_runtime, image=picture(2))
    assert device.captures == 2, "a loop without a mask is another one"


def test_a_callback_sees_the_blended_latents(
    engines: Path, img2img_runtime: SanaRuntime, device: HostDevice, module: HostTensorRT
) -> None:
    runtime, seen = opened(engines, device, module), ([], [])
    given = {**SMALL, "seed": 7, "output_type": "latent", "image": picture(), "mask": white_disk()}
    for one, rows in zip((runtime, img2img_runtime), seen, strict=True):

        def note(owner: Any, _i: int, _t: float, tensors: dict[str, Any], rows: list[Any] = rows) -> dict[str, Any]:
            rows.append(np.array(owner.to_host(tensors["latents"])))
            return {}

        one("a red fox", callback_on_step_end=note, **given)
    np.testing.assert_allclose(seen[0], seen[1], atol=TOLERANCE)


def test_a_bundle_without_engines_of_the_encoder_still_draws_from_text(
    engines: Path, img2img_runtime: SanaRuntime, device: HostDevice, module: HostTensorRT, tmp_path: Path
) -> None:
    bundle = shutil.copytree(engines, tmp_path / "bundle")
    manifest = Manifest.load(bundle)
    kept = tuple(entry for entry in manifest.engines if entry.graph not in ("vae_encoder", "blend"))
    type(manifest)(**{**vars(manifest), "engines": kept}).save(bundle)
    runtime = opened(bundle, device, module)
    assert_same(runtime, img2img_runtime)
    with pytest.raises(UsageError, match="no tensorrt-rtx engine for this request") as caught:
        runtime("a red fox", image=Image.new("RGB", (8, 8)), **SMALL)
    assert "no engine of vae_encoder" in str(caught.value.found)
    assert caught.value.fix == f"sana-export build {bundle} --backend tensorrt-rtx --height 96 --width 160 --batch 1"
