"""Quantized bundles in PyTorch on a GPU, where their weights stay quantized, against the same backend on the CPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_export.bench.gpu_check.suite import BACKEND_VARIABLE
from sana_export.calibration.run import Calibration
from sana_export.graphs.fp8_product import fp8_product, fp8_steps, has_kernel
from sana_export.graphs.quantized_tensor import QuantizedTensor
from sana_export.manifest import Manifest
from sana_export.quantization.schemes import SCHEMES as QUANTIZATION
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.torch import CudaTorchBackend, TorchBackend, reopen
from tests.runtime.backends.test_gpu_backends import REQUESTS, draw, psnr, why_not
from tests.support.bundles import exported

pytestmark = pytest.mark.gpu

#: Scheme -> the least PSNR of an image of the GPU against the CPU's. Where inputs are rounded, an error of the last bit moves a
#: number at the border between two steps by a whole step.
SCHEMES = {"int8-weight": 40.0, "int4-weight": 40.0, "int8": 25.0, "fp8": 25.0, "nvfp4": 20.0}


@pytest.fixture(
    scope="module", params=[os.environ[BACKEND_VARIABLE]] if BACKEND_VARIABLE in os.environ else ["torch", "torch-compile"]
)
def name(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    if reason := why_not(backend):
        pytest.skip(reason)
    return backend


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def bundle(scheme: str, tiny_checkpoint: Any, build_cache: Path) -> Path:
    calibrated = {"calibration": Calibration(["a red apple"], steps=2, size=128)} if QUANTIZATION[scheme].inputs else {}
    return exported(
        tiny_checkpoint,
        build_cache / f"tiny-fp32-{scheme}",
        quantize=[scheme],
        quantize_method=["nearest"],
        pag_layers=[1],
        **calibrated,
    )


@pytest.fixture(scope="module")
def found(name: str, bundle: Path) -> Iterator[SanaRuntime]:
    with SanaRuntime.from_pretrained(bundle, backend=name) as runtime:
        assert runtime.backend.device == "cuda"
        yield runtime


def on_the_cpu(bundle: Path, manifest: Manifest) -> TorchBackend:
    return TorchBackend(bundle, manifest, reopen(bundle, manifest), compiled=False)


def test_images_are_those_of_the_cpu_and_replayed_exactly(found: SanaRuntime, bundle: Path, scheme: str) -> None:
    with SanaRuntime.from_pretrained(bundle, backend=on_the_cpu) as wanted:
        for key in ("guidance", "another size", "two images", "PAG"):
            image = draw(found, **REQUESTS[key])
            assert psnr(image, draw(wanted, **REQUESTS[key])) >= SCHEMES[scheme], key
            np.testing.assert_array_equal(draw(found, **REQUESTS[key]), image, err_msg=key)


def test_weights_stay_quantized_on_the_gpu(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    backend = CudaTorchBackend(bundle, manifest, reopen(bundle, manifest), compiled=False)
    gc.collect()
    before = torch.cuda.memory_allocated()
    session = backend.load("denoiser")
    held = torch.cuda.memory_allocated() - before
    kept = [weight for weight in session.module.parameters() if isinstance(weight, QuantizedTensor)]
    assert len(kept) == len(manifest.graphs["denoiser"].quantized)
    on_disk = sum(entry.bytes for entry in manifest.graphs["denoiser"].data)
    assert held < 1.1 * on_disk + (1 << 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_this_gpu_multiplies_in_fp8(dtype: torch.dtype) -> None:
    """Its product against rounding, widening and multiplying in float64."""
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(4)
    if not has_kernel("fp8", "fp8", (1152, 3456), dtype, device):
        pytest.skip("PyTorch has no FP8 product for this GPU")
    x = torch.randn(2048, 1152, generator=generator).to(device, dtype)
    numbers = (30 * torch.randn(3456, 1152, generator=generator)).to(device, torch.float8_e4m3fn).T
    scales = (torch.rand(3456, generator=generator) / 1000 + 1e-4).to(device, dtype)
    step = torch.tensor(4 / 448, device=device)
    wanted = (fp8_steps(x, step).double() * step.double()) @ (numbers.double() * scales.double())
    error = (fp8_product(x, numbers, step, scales).double() - wanted).norm() / wanted.norm()
    assert error < {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 5e-5}[dtype]
