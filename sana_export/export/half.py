"""Half precision in torch on a CPU at the speed of single precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
#: The operators that are slow on a CPU without half-precision units.
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.convolution.default}


class WideProducts(TorchDispatchMode):
    """While this mode is active, half-precision products and convolutions run in float32 and are rounded once to their dtype.

    That is what torch's own half-precision kernels store, since they accumulate in float32. Other operators are unchanged.
    """

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        dtype = next((value.dtype for value in args if isinstance(value, Tensor)), None)
        if function not in PRODUCTS or dtype not in HALF:
            return function(*args, **(kwargs or {}))
        return function(*tree_map(_widen, tuple(args)), **(kwargs or {})).to(dtype)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
