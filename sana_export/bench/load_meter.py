"""Measures how busy other processes keep the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def busy_seconds() -> float | None:
    """CPU seconds that all processes together have used since the machine started. None if the system does not report it."""
    try:
        fields = Path("/proc/stat").read_text("utf-8").splitlines()[0].split()
        user, nice, system, _idle, _wait, interrupt, soft_interrupt = map(int, fields[1:8])
        return (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


class LoadMeter:
    """Measures the share of all cores' time that other processes use from now on.

    `own` returns the CPU seconds of the benchmark's other processes. Those of this process are counted by the meter.
    """

    def __init__(self, own: Callable[[], float]) -> None:
        self._own, self._started, self._before = own, time.monotonic(), self._elsewhere(own)

    def other_load(self) -> float | None:
        """The share since the start, from 0 to 1. None if the system does not report it."""
        after = self._elsewhere(self._own)
        if self._before is None or after is None:
            return None
        available = (time.monotonic() - self._started) * (os.cpu_count() or 1)
        return min(max((after - self._before) / available, 0.0), 1.0)

    @staticmethod
    def _elsewhere(own: Callable[[], float]) -> float | None:
        busy = busy_seconds()
        return None if busy is None else busy - own() - time.process_time()
