"""What the property-based tests share."""

from __future__ import annotations

from hypothesis import settings

from tests.support.memory_limit import MIB, at_most

__all__ = ["MIB", "at_most", "inputs"]


def inputs(share: float) -> settings:
    """Settings for a slow test: `share` of the inputs that other tests get. For a fast test, `share` is more than 1."""
    return settings(max_examples=max(int(settings().max_examples * share), 1))
