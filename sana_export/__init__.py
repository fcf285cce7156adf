"""Sana on NVIDIA GPUs: deployment graphs, TensorRT engines and a runtime without PyTorch."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["SanaRuntime", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "SanaRuntime":
        from sana_export.runtime import SanaRuntime

        return SanaRuntime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
