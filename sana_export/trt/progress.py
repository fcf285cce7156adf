"""The progress of a build: TensorRT's nested phases as one number, and a way to stop the build."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sana_export.progress import OnProgress, Progress


@dataclass
class _Phase:
    """An open phase."""

    #: The name of the phase that it is part of.
    parent: str | None
    #: Number of its steps.
    steps: int
    #: Number of finished steps.
    done: int = 0


class Phases:
    """The open phases of one build. Every method returns the finished fraction of the whole build, 0 to 1.

    The fraction counts steps of phases, not seconds. Thread-safe: the builder reports from any of its threads.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._reached = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """Open a phase."""
        with self._lock:
            self._open[name] = _Phase(parent, max(steps, 1))
            return self._fraction()

    def step(self, name: str) -> float:
        """Count a finished step of an open phase."""
        with self._lock:
            if name in self._open:
                self._open[name].done += 1
            return self._fraction()

    def finish(self, name: str) -> float:
        """Close a phase. The build is finished when its outermost phase is."""
        with self._lock:
            phase = self._open.pop(name, None)
            if phase is not None and phase.parent is None:
                self._reached = 1.0
            return self._fraction()

    def _fraction(self) -> float:
        roots = [name for name, phase in self._open.items() if phase.parent not in self._open]
        inside = max((self._inside(name) for name in roots), default=0.0)
        self._reached = max(self._reached, inside)
        return self._reached

    def _inside(self, name: str) -> float:
        phase = self._open[name]
        children = (self._inside(child) for child, other in self._open.items() if other.parent == name)
        return min((phase.done + max(children, default=0.0)) / phase.steps, 1.0)


def progress_monitor(module: Any, graph: str, on_progress: OnProgress | None, stop: Callable[[], bool]) -> Any:
    """An `IProgressMonitor` of `module` that reports to `on_progress` and ends the build when `stop()` is true.

    A report says "graph: phase" and, of 1 step in all, the finished fraction. An exception of `on_progress` ends the build too; the
    monitor keeps it in `raised`.
    """

    class Monitor(module.IProgressMonitor):
        """The builder calls these methods from its own threads. Exceptions must not pass through it."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.phases = Phases()
            self.raised: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._report(name, self.phases.start(name, parent, steps))

        def step_complete(self, name: str, _step: int) -> bool:
            self._report(name, self.phases.step(name))
            return self.raised is None and not stop()

        def phase_finish(self, name: str) -> None:
            self._report(name, self.phases.finish(name))

        def _report(self, phase: str, fraction: float) -> None:
            if on_progress is None or self.raised is not None:
                return
            try:
                on_progress(Progress(f"{graph}: {phase}", fraction, 1))
            except BaseException as error:  # `build_engine` raises it again when the builder has returned
                self.raised = error

    return Monitor()
