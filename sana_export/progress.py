"""How far a long call is: export, build, verify, bench and synth all report it the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a running call. The call is finished when `done` equals `total`."""

    #: The name of the current step.
    doing: str
    #: Number of finished steps. A fraction is the finished part of the current step.
    done: float
    #: Number of all steps.
    total: float
    #: Estimated time until the call is finished. None if it cannot be estimated yet.
    seconds_left: float | None = None
    #: Bytes written so far. 0 if the call does not count bytes.
    bytes_done: int = 0
    #: Bytes that the call will have written in the end. 0 if it does not count bytes.
    bytes_total: int = 0


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """An `OnProgress` that does nothing."""
