"""The progress of an export."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from sana_export.progress import OnProgress, Progress


class ExportMeter:
    """Reports every step to `on_progress`, with the bytes written so far and an estimate of the remaining time.

    `sizes` gives the bytes that each part takes, in the order in which the parts are written.
    """

    def __init__(self, sizes: Mapping[str, int], on_progress: OnProgress) -> None:
        self._sizes, self._on_progress, self._durations = sizes, on_progress, dict[str, float]()

    @contextlib.contextmanager
    def step(self, part: str, doing: str) -> Iterator[None]:
        """Report that `part` starts, and measure how long the block takes."""
        self._report(doing, list(self._sizes).index(part))
        started = time.monotonic()
        yield
        self._durations[part] = time.monotonic() - started

    @property
    def seconds(self) -> float:
        """The total duration of the finished steps."""
        return sum(self._durations.values())

    def done(self) -> None:
        """Report that all steps are finished."""
        self._report("done", len(self._sizes))

    def _report(self, doing: str, index: int) -> None:
        parts = list(self._sizes)
        written, total = sum(self._sizes[part] for part in parts[:index]), sum(self._sizes.values())
        timed = sum(self._sizes[part] for part in self._durations)
        left = self.seconds / timed * (total - written) if timed and total > written else None
        self._on_progress(Progress(doing, index, len(parts), left, bytes_done=written, bytes_total=total))
