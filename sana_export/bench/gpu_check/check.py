"""What a part is to the process that runs it: a function that is told where to work, and how it says that a limit was missed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"


class CheckFailed(Exception):
    """A check ran and its limit was missed; `str()` says which."""


@dataclass(frozen=True)
class Context:
    """Where a part works. `work`: a folder for what is made, kept between runs. `device`: "cuda" or "cpu".

    keep: notes what has been found so far, in case the part is ended before it is done.
    """

    work: Path
    device: str
    keep: Callable[[Mapping[str, Any]], None]


class Check(Protocol):
    """What a part's target is. Returns what it found. Raises CheckFailed; DependencyError where it cannot be done here."""

    def __call__(self, context: Context, **arguments: Any) -> Mapping[str, Any]: ...
