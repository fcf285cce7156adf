"""Sampling from a bundle without PyTorch: numpy, tokenizers, pillow and one backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana_export.runtime.pipeline import SanaRuntime as SanaRuntime
    from sana_export.runtime.request import Request as Request
    from sana_export.runtime.results import SanaResult as SanaResult

_HOMES = {
    "Request": "sana_export.runtime.request",
    "SanaResult": "sana_export.runtime.pipeline",
    "SanaRuntime": "sana_export.runtime.pipeline",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """The classes above, imported when they are first asked for: the modules beside this one need less."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
