"""Tensors between PyTorch and a backend: the values, without a copy, for as long as either side needs them.

No test here has a GPU. Addresses are passed as on one, to a device in host memory. ONNX Runtime gets tensors through DLPack on the
CPU.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_export.integrations.diffusers.tensors import (
    Exchange,
    HostExchange,
    OrtExchange,
    PointerExchange,
    TorchExchange,
    aligned_copy,
    exchange_with,
    tensor_at,
)
from sana_export.integrations.diffusers.transformer import BundleTransformer
from sana_export.integrations.diffusers.use import BundleUse, skeleton
from sana_export.integrations.diffusers.vae import BundleVae
from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.profiles import Profile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.base import BackendSettings
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.trt.compatibility import Host
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")
CPU = torch.device("cpu")
WIDE = Profile("wide", (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512)))


class SharedHostDevice(HostDevice):
    """Reads PyTorch's memory too, as a GPU does."""

    def inside(self, address: int, size: int) -> None:
        return None


class HostOrder:
    """The order of two streams on a device in host memory: whatever is enqueued is done before PyTorch reads."""

    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.given: list[torch.Tensor] = []

    def before(self, tensor: torch.Tensor) -> None:
        self.given.append(tensor)

    def after(self) -> None:
        self.device.wait()


@pytest.fixture
def engines(tiny_bundle: Path, tmp_path: Path) -> TensorRTBackend:
    """The engines of `tiny-random` on a device in host memory."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest: Manifest = with_engines(bundle, WIDE)
    device = SharedHostDevice()
    return TensorRTBackend(
        bundle, manifest, "tensorrt-rtx", BackendSettings(), module=HostTensorRT(device), device=device, machine=HERE
    )


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def test_engines_read_and_write_pytorch_tensors_by_address(engines: TensorRTBackend, tiny_runtime: SanaRuntime) -> None:
    order = HostOrder(engines.gpu)  # type: ignore[arg-type]
    exchange = PointerExchange(CPU, order)
    latents = aligned_copy(values(1, 32, 2, 3))
    given = exchange.give(latents)
    assert order.given[0].data_ptr() == given.address
    uploaded = engines.gpu.uploaded  # type: ignore[attr-defined]
    decoder = engines.load("vae_decoder")
    image = exchange.take(decoder.run({"latents": given})["image"])
    assert engines.gpu.uploaded == uploaded  # type: ignore[attr-defined]
    wanted = tiny_runtime.to_host(tiny_runtime.run("vae_decoder", {"latents": latents.numpy()})["image"])
    np.testing.assert_allclose(image.numpy(), wanted, atol=1e-5)
    assert engines.gpu.downloaded == 0  # type: ignore[attr-defined]


def test_a_tensor_that_is_not_aligned_is_copied() -> None:
    exchange = PointerExchange(CPU, HostOrder(SharedHostDevice()))
    whole = values(4 * 64 + 1)
    odd, strided = whole[1:].view(4, 64), values(6, 4).T
    for tensor in (odd, strided, values(2, 2).double()):
        given = exchange.give(tensor)
        assert given.address % 256 == 0
        assert (given.shape, given.dtype) == (tuple(tensor.shape), "float32")
        np.testing.assert_array_equal(tensor_at(given.address, given.shape, given.dtype, given, CPU), tensor.float())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_both_directions_share_memory_and_keep_it(dtype: str) -> None:
    kind = getattr(torch, dtype)
    exchanges: list[Exchange] = [PointerExchange(CPU, HostOrder(SharedHostDevice())), TorchExchange("cpu")]
    exchanges += [OrtExchange(CPU)] if dtype != "bfloat16" else []
    for exchange in exchanges:
        tensor = torch.arange(512).reshape(2, 256).to(kind)
        wanted, tensor = tensor, aligned_copy(tensor)
        address = tensor.data_ptr()
        back = exchange.take(exchange.give(tensor, dtype))
        assert (back.data_ptr(), back.dtype) == (address, kind)
        del tensor
        gc.collect()
        others = [torch.full((2, 256), -1, dtype=kind) for _ in range(8)]  # in the memory of the tensor, if it was freed
        assert others
        torch.testing.assert_close(back, wanted)


def test_onnxruntime_reads_pytorch_tensors(tiny_runtime: SanaRuntime) -> None:
    exchange, latents = OrtExchange(CPU), values(1, 32, 2, 2)
    image = exchange.take(tiny_runtime.run("vae_decoder", {"latents": exchange.give(latents)})["image"])
    wanted = tiny_runtime.to_host(tiny_runtime.run("vae_decoder", {"latents": latents.numpy()})["image"])
    np.testing.assert_array_equal(image, wanted)


def test_the_exchange_of_each_backend(tiny_runtime: SanaRuntime, engines: TensorRTBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    assert type(exchange_with(tiny_runtime.backend)) is HostExchange
    assert type(exchange_with(engines)) is HostExchange, "this PyTorch has no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: made.append((stream, device)))
    exchange = exchange_with(engines)
    assert (type(exchange), exchange.device) == (PointerExchange, torch.device("cuda", 0))
    assert made == [(engines.gpu.stream, torch.device("cuda", 0))]
    assert type(exchange_with(tiny_runtime.backend)) is HostExchange, "it runs on the CPU"


def test_a_step_and_a_decoder_on_engines(engines: TensorRTBackend, tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    """The stand-ins with tensors by address, against the same with arrays."""
    runtime = SanaRuntime(engines, tiny_runtime.text)
    order = HostOrder(engines.gpu)  # type: ignore[arg-type]
    latents, embeds = values(1, 32, 4, 4).repeat(2, 1, 1, 1), values(2, 9, tiny_pipeline.transformer.config.caption_channels)
    mask = torch.tensor([[1] + [0] * 8, [1] * 5 + [0] * 4])
    found = []
    for own in (runtime, tiny_runtime):
        parts = {"transformer": BundleTransformer, "vae": BundleVae}
        made = {name: skeleton(kind, getattr(tiny_pipeline, name)) for name, kind in parts.items()}
        for name, module in made.items():
            module.attach(name, BundleUse(tiny_pipeline, own, owned=False), getattr(tiny_pipeline, name))
        if own is runtime:
            made["transformer"].contexts._exchange = made["transformer"].exchange = made["vae"].exchange = PointerExchange(
                CPU, order
            )
        step = made["transformer"](latents, embeds, torch.tensor([700.0, 700.0]), encoder_attention_mask=mask).sample
        found.append((step, made["vae"].decode(step[:1] * 2.0).sample))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        wanted = tiny_pipeline.transformer(latents, embeds, torch.tensor([700.0, 700.0]), encoder_attention_mask=mask).sample
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-3, atol=1e-3)
