"""The runtime: samples images from a bundle with numpy, tokenizers, Pillow and one backend, without PyTorch.

`Request`, `SanaResult` and `SanaRuntime` are imported when they are first used, so that importing a module of this package does not
import all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana_export.runtime.pipeline import SanaRuntime as SanaRuntime
    from sana_export.runtime.request import Request as Request
    from sana_export.runtime.results import SanaResult as SanaResult

#: The module that defines each name.
_MODULES = {
    "Request": "sana_export.runtime.request",
    "SanaResult": "sana_export.runtime.results",
    "SanaRuntime": "sana_export.runtime.pipeline",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
