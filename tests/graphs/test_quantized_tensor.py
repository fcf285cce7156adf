"""Quantized weights as tensors: what they stand for, what their products compute, also compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d

from sana_export.formats.quantized import as_used, dequantize, pack, scale_shape, unpack
from sana_export.graphs import fp8_product as fp8_product_module
from sana_export.graphs.fp8_product import fp8_product, has_kernel
from sana_export.graphs.products import ProductForm, compute_quantized
from sana_export.graphs.quantized_tensor import Layout, QuantizedTensor

IN, OUT = 64, 32
#: Type -> how many numbers share a scale.
TYPES = {"int8": 0, "fp8": 0, "int4": 32, "fp4": 16}


def weight(
    dtype: str, seed: int, *, transposed: bool, shape: tuple[int, ...], parts: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A random quantized weight of `shape`, whose numbers are stored as [in, out], and the plain one that numpy makes of it."""
    random, block, inputs = np.random.default_rng(seed), TYPES[dtype], "int8" if "input_scale" in parts else ""
    codes = random.integers(-7 if dtype == "int4" else -100, 8 if dtype == "int4" else 100, (IN, OUT)).astype(np.int8)
    codes = codes & 0xF if dtype == "fp4" else codes & ~0x1F if dtype == "fp8" else codes  # no NaN
    axis = 0 if block else 1
    scales = random.random(scale_shape((IN, OUT), axis, block)).astype(np.float32)
    stored = pack(codes, dtype)
    plain = as_used(dequantize(unpack(stored, dtype, (IN, OUT)), scales, axis, block), transposed, shape)
    numbers = torch.from_numpy(stored)
    if not block:
        numbers = numbers.view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn).reshape(IN, OUT)
    layout = Layout(dtype, (IN, OUT), axis, block, transposed, inputs)
    return QuantizedTensor(numbers, torch.from_numpy(scales), layout, shape, parts), torch.from_numpy(plain)


class Layers(nn.Module):
    """Weights on the right, on the left, and as a kernel. x is [B, in, h, w]."""

    def __init__(self, right: Tensor, left: Tensor, kernel: Tensor) -> None:
        super().__init__()
        self.right, self.left, self.kernel = (nn.Parameter(w, requires_grad=False) for w in (right, left, kernel))
        self.bias = nn.Parameter(torch.arange(OUT, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.movedim(1, -1) @ self.right).movedim(-1, 1)
        z = (self.left @ x.flatten(2)).unflatten(2, x.shape[2:])
        return y + z + conv2d(x, self.kernel, self.bias)


def layers(dtype: str, seed: int, *, rounds: bool = True) -> tuple[Layers, Layers, dict[str, ProductForm]]:
    """The same layers with quantized and with plain weights, and the forms of the plain ones."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "factor": torch.rand(IN, generator=generator) + 0.5,
        "down": torch.randn(IN, 4, generator=generator),
        "up": torch.randn(4, OUT, generator=generator),
        **({"input_scale": torch.tensor(0.0625)} if rounds else {}),
    }
    shapes = {"right": ((IN, OUT), False), "left": ((OUT, IN), True), "kernel": ((OUT, IN, 1, 1), True)}
    made = [
        weight(dtype, seed + index, transposed=transposed, shape=shape, parts=parts)
        for index, (shape, transposed) in enumerate(shapes.values())
    ]
    form = ProductForm("int8" if rounds else "", 0.0625, parts["factor"], parts["down"], parts["up"])
    return Layers(*(q for q, _ in made)), Layers(*(plain for _, plain in made)), dict.fromkeys(shapes, form)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rounds", [True, False])
def test_products_are_those_of_the_plain_weight_in_the_layer_s_form(dtype: str, rounds: bool) -> None:
    found, plain, forms = layers(dtype, 5, rounds=rounds)
    x = torch.randn(2, IN, 3, 5, generator=torch.Generator().manual_seed(1))
    compute_quantized(plain, forms)
    torch.testing.assert_close(found(x), plain(x), rtol=1e-5, atol=1e-4)
    for name in ("right", "left", "kernel"):
        assert torch.equal(getattr(found, name).wide(), getattr(plain, name))


def test_layers_of_one_kind_are_compiled_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(2, IN, 3, 5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for seed in (10, 20, 30):
            module, _, _ = layers("int4", seed)
            wanted = module(x)
            compiled = torch.compile(module.forward, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_code_of_a_layer_is_not_that_of_a_layer_with_other_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch keeps compiled code on disk, by what `QuantizedTensor` says of itself."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(3, IN, generator=generator)

    def branch(rank: int) -> dict[str, Tensor]:
        return {"down": torch.randn(IN, rank, generator=generator), "up": torch.randn(rank, OUT, generator=generator)}

    for parts in ({}, {"factor": torch.rand(IN, generator=generator) + 2}, branch(4), branch(8)):
        made, plain = weight("int8", 8, transposed=False, shape=(IN, OUT), parts=parts)
        layer = nn.Module()
        layer.weight = nn.Parameter(made, requires_grad=False)
        wanted = (x * parts.get("factor", 1)) @ plain
        wanted = wanted + x @ parts["down"] @ parts["up"] if "down" in parts else wanted
        torch._dynamo.reset()
        found = torch.compile(lambda x, layer=layer: x @ layer.weight)(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)


def test_a_copy_and_another_dtype() -> None:
    quantized, plain = weight("int4", 3, transposed=True, shape=(OUT, IN), parts={})
    copied = quantized.detach().clone()
    assert isinstance(copied, QuantizedTensor)
    assert torch.equal(copied.wide(), plain)
    assert copied.numbers.data_ptr() != quantized.numbers.data_ptr()
    assert torch.equal(quantized.to(torch.float64), plain.double())
    assert torch.equal(quantized[1:3], plain[1:3])


def test_what_would_lose_something_is_refused() -> None:
    quantized, _ = weight("int8", 3, transposed=True, shape=(OUT, IN), parts={"factor": torch.ones(IN)})
    with pytest.raises(RuntimeError, match="a layer with factor is more than its weight"):
        quantized[1:3]
    with pytest.raises(RuntimeError, match="cannot write into a quantized weight"):
        quantized.copy_(torch.zeros(OUT, IN))


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_the_fp8_product_multiplies_the_rounded_input(axis: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 6, 8, IN, generator=generator).bfloat16().movedim(-1, axis)
    numbers = (20 * torch.randn(OUT, IN, generator=generator)).to(torch.float8_e4m3fn).T
    scales, step = (torch.rand(OUT, generator=generator) + 0.5).bfloat16(), torch.tensor(1 / 32)
    found = fp8_product(x, numbers, step, scales, axis).movedim(axis, -1)
    steps = (x.movedim(axis, -1).float() / step).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    wanted = (steps * step) @ (numbers.double() * scales.double())
    assert (found.double() - wanted).norm() < 4e-3 * wanted.norm()


@pytest.mark.parametrize("place", range(3))
def test_a_gpu_s_kernel_gets_tensors_in_its_layout(place: int) -> None:
    """PyTorch checks layouts and dtypes on fake tensors of a GPU too. The channels are at any place in memory."""
    with FakeTensorMode():
        numbers = torch.empty(OUT, IN, device="cuda", dtype=torch.float8_e4m3fn).T
        scales, bias = torch.empty(OUT, device="cuda").half(), torch.empty(OUT, device="cuda").half()

        def made(shape: tuple[int, ...], transposed: bool) -> Tensor:
            layout = Layout("fp8", (IN, OUT), 1, 0, transposed, "fp8", kernel=True)
            return QuantizedTensor(numbers, scales, layout, shape, {"input_scale": torch.empty((), device="cuda")})

        shape = [1, 6, 8]  # of two images, reshape would make a copy that has the layout
        shape.insert(1 + place, IN)
        x = torch.empty(shape, device="cuda").half().movedim(1 + place, 1)
        assert (x.movedim(1, -1) @ made((IN, OUT), False)).shape == (1, 6, 8, OUT)
        assert (made((OUT, IN), True) @ x.select(3, 0)).shape == (1, OUT, 6)
        assert conv2d(x, made((OUT, IN, 1, 1), True), bias).shape == (1, OUT, 6, 8)


def test_a_cpu_takes_no_kernel() -> None:
    assert not has_kernel("fp8", "fp8", (IN, OUT), torch.float16, torch.device("cpu"))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError])
def test_a_kernel_that_pytorch_refuses_is_not_taken(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise error("only bf16")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert not fp8_product_module._is_right.__wrapped__(torch.float16, torch.device("cpu"))


def test_out_of_memory_says_nothing_about_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "_scaled_mm", full)
    with pytest.raises(torch.OutOfMemoryError):
        fp8_product_module._is_right.__wrapped__(torch.float16, torch.device("cpu"))


def test_a_right_kernel_is_taken_and_a_wrong_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    is_right, scaled = fp8_product_module._is_right.__wrapped__, torch._scaled_mm
    assert is_right(torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: 1.01 * scaled(*args, **kwargs))
    assert not is_right(torch.bfloat16, torch.device("cpu"))
