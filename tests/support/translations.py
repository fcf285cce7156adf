"""PyTorch's table of translations to ONNX, which it makes anew for each graph that is exported: a third of a second."""

from __future__ import annotations

import functools
import sys

_MODULE = "torch.onnx._internal.exporter._registration"


def keep_translations() -> None:
    """Let this process make the table once. Does nothing before the first export, which imports PyTorch's exporter."""
    registry = getattr(sys.modules.get(_MODULE), "ONNXRegistry", None)
    made = vars(registry).get("from_torchlib") if registry is not None else None
    if isinstance(made, classmethod) and not hasattr(made.__func__, "cache_info"):
        registry.from_torchlib = classmethod(functools.lru_cache(made.__func__))
