"""Named ranges for outside tools (Nsight Systems), where the package nvtx is installed; nothing otherwise."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any


def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """A range called `name` around what runs inside of it."""
    library = _library()
    return nullcontext() if library is None else library.annotate(name, domain="sana_export")


@cache
def _library() -> Any:
    try:
        return importlib.import_module("nvtx")
    except ImportError:
        return None
