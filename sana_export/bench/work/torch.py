"""Counts the work of PyTorch modules while they run. On the "meta" device this needs neither memory nor time.

FLOP come from PyTorch's own table (`torch.utils.flop_counter`). Bytes are those of each counted operator's inputs and outputs; an
expanded axis counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sana_export.bench.work.count import Product, Work


def torch_work(run: Callable[[], Any]) -> Work:
    """The work of all products that `run` calls."""
    counter = _Counter()
    with torch.no_grad(), counter:
        run()
    return Work.of(counter.products)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = function._overloadpacket, kwargs or {}
        if packet not in flop_registry:
            with self:  # a composite operator is counted by its parts, as PyTorch's own counter does
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        if packet in flop_registry:
            flop = flop_registry[packet](*args, **kwargs, out_val=result)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.products.append(Product("", str(packet), int(flop), sum(map(_bytes, tensors))))
        return result


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers. An expanded axis has only one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()
