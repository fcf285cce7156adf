"""The interface of a part: a function that runs in a child process and returns what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"


class CheckFailed(Exception):
    """A check ran and missed its limit. `str()` says which one."""


@dataclass(frozen=True)
class PartContext:
    """Where a part works."""

    #: A folder for files that are kept between runs.
    work: Path
    #: "cuda" or "cpu".
    device: str
    #: Saves what has been found so far, in case the part is ended before it returns.
    keep: Callable[[Mapping[str, Any]], None]


class Check(Protocol):
    """The function of a part. It returns what it found.

    It raises CheckFailed if a limit was missed, and DependencyError if this machine cannot run it.
    """

    def __call__(self, context: PartContext, **arguments: Any) -> Mapping[str, Any]: ...
