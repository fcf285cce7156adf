"""Products of weights seen from outside: which are found, and what quantized layers compute."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sana_export.graphs.numerics import NUMERICS, Conv, Linear, parameter
from sana_export.graphs.products import ProductForm, ProductMode, compute_quantized, rounded


class Layers(nn.Module):
    """A weight as a right factor, as a left one, as a kernel, and a part of a kernel. x is [B, 8, 2, 3]."""

    def __init__(self) -> None:
        super().__init__()
        generator, numerics = torch.Generator().manual_seed(0), NUMERICS["float32"]
        wide = torch.randn(16, 8, generator=generator)
        self.right = Linear(wide[:8], torch.randn(8, generator=generator), numerics)  # a part of one storage
        self.left = parameter(torch.randn(8, 8, generator=generator), torch.float32)
        self.kernel = Conv(torch.randn(8, 8, 1, 1, generator=generator), torch.randn(8, generator=generator), numerics)

    def forward(self, x: Tensor) -> Tensor:
        y = self.right(x.movedim(1, -1)).movedim(-1, 1)
        z = (self.left @ x.flatten(2)).unflatten(2, x.shape[2:])
        return y + z + self.kernel(x)


NAMES = ("right.weight", "left", "kernel.weight")


class Log(ProductMode):
    """Notes each product."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__({name: module.get_parameter(name) for name in NAMES})
        self.seen: list[tuple[str, int, int]] = []

    def product(self, name: str, multiply: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
        self.seen.append((name, axis, x.shape[axis]))
        return multiply(x)


def test_every_product_of_a_weight_or_of_a_part_of_it_is_seen() -> None:
    module, x = Layers(), torch.randn(2, 8, 2, 3, generator=torch.Generator().manual_seed(1))
    with Log(module) as log:
        found = module(x)
        conv2d(x, module.kernel.weight[4:])
    assert log.seen == [("right.weight", -1, 8), ("left", -2, 8), ("kernel.weight", -3, 8), ("kernel.weight", -3, 8)]
    torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_with_factors_and_a_branch_computes_the_same_function(name: str) -> None:
    """W = diag(1 / f) (W' + down up): without rounding, the forms are exact."""
    module, generator = Layers(), torch.Generator().manual_seed(2)
    x = torch.randn(2, 8, 2, 3, generator=generator)
    wanted = module(x)
    factor = torch.rand(8, generator=generator) + 0.5
    down, up = torch.randn(8, 2, generator=generator), torch.randn(2, 8, generator=generator)
    weight = module.get_parameter(name)
    matrix = weight if name == "right.weight" else weight.flatten(1).T
    rest = matrix / factor[:, None] - down @ up
    weight.data = (rest if name == "right.weight" else rest.T).reshape(weight.shape).contiguous()
    compute_quantized(module, {name: ProductForm(factor=factor, down=down, up=up)})
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)


def test_inputs_are_rounded_as_onnx_rounds_them() -> None:
    x = torch.tensor([0.0, 0.24, 0.25, 0.75, -0.75, 70.0, -70.0])
    assert rounded(x, "int8", 0.5).tolist() == [0.0, 0.0, 0.0, 1.0, -1.0, 63.5, -64.0]
    assert rounded(x, "", 0.5) is x
    wide = torch.tensor([1.0, 1.06, 1.07, 1000.0, -1000.0])
    assert rounded(wide, "fp8", 1.0).tolist() == [1.0, 1.0, 1.125, 448.0, -448.0]
    assert rounded(wide.half(), "fp8", 1.0).dtype == torch.float16


def test_forms_replace_each_other() -> None:
    module, x = Layers(), torch.randn(1, 8, 2, 3, generator=torch.Generator().manual_seed(3))
    plain = module(x)
    compute_quantized(module, {"left": ProductForm("int8", 0.5)})
    coarse = module(x)
    assert (coarse - plain).abs().max() > 0.1
    compute_quantized(module, {})
    assert torch.equal(module(x), plain)


def test_a_module_with_forms_is_freed_with_its_last_user() -> None:
    """In staged memory a graph must go before the next one comes."""
    module = Layers()
    compute_quantized(module, {"left": ProductForm("int8", 0.5)})
    module(torch.zeros(1, 8, 2, 3))
    freed = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert freed() is None
    finally:
        gc.enable()
