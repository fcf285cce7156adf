"""LoRAs in the TensorRT backend, on a device in host memory: the latents are those of ONNX Runtime with the same LoRAs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_export.errors import ArtifactError
from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.profiles import Profile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.trt.compatibility import Host
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")
WIDE, WIDE_TOO = (Profile(name, (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512))) for name in ("wide", "wide too"))
#: float32 in another order: text tokens are padded to a multiple of 32 for engines.
TOLERANCE = 2e-4
REFITTABLE = {"options": {"tf32": False, "refittable": True}}


def opened(bundle: Path, module: HostTensorRT, **options: Any) -> SanaRuntime:
    def backend(bundle: Path, manifest: Manifest) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", module=module, device=module.device, machine=HERE)

    return SanaRuntime.from_pretrained(bundle, backend=backend, **options)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("refittable") / "bundle"))
    with_engines(copy, WIDE, **REFITTABLE)
    return copy


@pytest.fixture
def module() -> HostTensorRT:
    return HostTensorRT(HostDevice())


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on one layer of each graph."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("1.attn1.to_k", "2.attn2.to_v"):
        name = f"transformer.transformer_blocks.{layer}"
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(4, 128, generator=generator)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(128, 4, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    save_file(tensors, path)
    return path


def latents(runtime: SanaRuntime) -> Any:
    return runtime("a red fox", seed=7, output_type="latent", **SMALL).images


@pytest.fixture(scope="module")
def wanted(tiny_bundle: Path, lora: Path) -> tuple[Any, Any]:
    """ONNX Runtime's latents without the LoRA and with it."""
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")
    plain = latents(runtime)
    runtime.load_lora(lora)
    return plain, latents(runtime)


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_latents_with_and_without_the_lora(
    bundle: Path, module: HostTensorRT, lora: Path, wanted: tuple[Any, Any], memory: str
) -> None:
    """Also with a loop that was captured before: it must not use the old weights."""
    plain, changed = wanted
    assert np.abs(changed - plain).max() > 100 * TOLERANCE
    runtime = opened(bundle, module, memory=memory)
    before = latents(runtime)
    np.testing.assert_allclose(before, plain, atol=TOLERANCE)
    filled = len(module.refits)
    runtime.load_lora(lora)
    if memory == "resident":
        assert module.refits[filled:] == [("context", {"projection.weight"}), ("denoiser", {"blocks.1.qkv"})]
    np.testing.assert_allclose(latents(runtime), changed, atol=TOLERANCE)
    runtime.unload_lora()
    np.testing.assert_array_equal(latents(runtime), before)


def test_a_refit_that_fails_leaves_both_graphs_as_they_were(bundle: Path, module: HostTensorRT, lora: Path) -> None:
    runtime = opened(bundle, module)
    before = latents(runtime)
    module.refits_fail_on = "denoiser"
    with pytest.raises(ArtifactError, match="out of device memory"):
        runtime.load_lora(lora)
    module.refits_fail_on = ""
    assert runtime.loras == ()
    np.testing.assert_array_equal(latents(runtime), before)


def test_engines_with_their_weights_inside_name_the_command_that_builds_others(
    tiny_bundle: Path, tmp_path: Path, module: HostTensorRT, lora: Path, wanted: tuple[Any, Any]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with_engines(bundle, WIDE)
    runtime = opened(bundle, module)
    before = latents(runtime)
    with pytest.raises(ArtifactError, match="weights of context are inside its engines") as caught:
        runtime.load_lora(lora)
    assert caught.value.fix == f"sana-export build {bundle} --backend tensorrt-rtx --graphs context --refittable"
    np.testing.assert_array_equal(latents(runtime), before)


def test_with_a_lora_only_refittable_engines_run(
    tiny_bundle: Path, tmp_path: Path, module: HostTensorRT, lora: Path, wanted: tuple[Any, Any]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with_engines(bundle, WIDE)
    with_engines(bundle, WIDE_TOO, **REFITTABLE)
    entries = Manifest.load(bundle).engines
    assert {entry.refittable for entry in entries if entry.graph == "denoiser"} == {True, False}
    runtime = opened(bundle, module)
    np.testing.assert_allclose(latents(runtime), wanted[0], atol=TOLERANCE)
    runtime.load_lora(lora)
    np.testing.assert_allclose(latents(runtime), wanted[1], atol=TOLERANCE)
