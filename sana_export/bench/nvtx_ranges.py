"""Named ranges for profilers such as Nsight Systems. They need the package nvtx; without it they do nothing."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any


def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """A range called `name` around a block of code."""
    library = _library()
    return nullcontext() if library is None else library.annotate(name, domain="sana_export")


@cache
def _library() -> Any:
    try:
        return importlib.import_module("nvtx")
    except ImportError:
        return None
