"""Half precision computed in float32 equals torch's own half-precision kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from sana_export.export.half import WideProducts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("product", ["linear", "matmul", "bmm", "conv"])
def test_products_equal_those_of_the_exact_numbers(product, dtype):
    """The result is the exact product of the rounded factors, rounded once."""
    x, w = torch.randn(4, 12, 12).to(dtype), torch.randn(4, 12, 12).to(dtype)
    bias = torch.randn(12).to(dtype)
    run = {
        "linear": lambda x, w, bias: torch.nn.functional.linear(x, w[0], bias),
        "matmul": lambda x, w, bias: x @ w[0],
        "bmm": lambda x, w, bias: x @ w,
        "conv": lambda x, w, bias: conv2d(x, w[0].reshape(12, 4, 3, 1), bias[:12], padding=1),
    }[product]
    with WideProducts():
        found = run(x, w, bias)
    wanted = run(x.double(), w.double(), bias.double())
    assert found.dtype == dtype
    # A float32 sum of at most 13 terms, rounded once. The sum's error grows with the magnitude of its terms, not of the result.
    summed = 13 * torch.finfo(torch.float32).eps * run(x.double().abs(), w.double().abs(), bias.double().abs())
    error = (found.double() - wanted).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * wanted.abs() + summed).all()
    torch.testing.assert_close(found, run(x, w, bias), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_overflow_is_kept():
    with WideProducts():
        assert (torch.full((2, 2), 300.0).half() @ torch.full((2, 2), 300.0).half()).isinf().all()
