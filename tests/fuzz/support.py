"""What the property-based tests share."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import settings

MIB = 2**20


def inputs(share: float) -> settings:
    """Settings for a slow test: `share` of the inputs that other tests get."""
    return settings(max_examples=max(int(settings().max_examples * share), 1))


@contextmanager
def at_most(bytes: int) -> Iterator[None]:
    """Fail if the block has more than `bytes` of Python's and numpy's memory allocated at one time. Maps of files do not count."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= bytes, f"{peak / MIB:.1f} MiB were allocated; the limit is {bytes / MIB:.1f} MiB"
