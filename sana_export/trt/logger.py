"""TensorRT's log, forwarded to `logging`, and what it said during one piece of work.

TensorRT uses one logger per process: a builder or runtime that is created while another one is alive gets the first one's logger.
So there is one logger per module. It keeps nothing itself: whoever wants to know what TensorRT says opens a `CollectedLog`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from sana_export.trt.layers import HEAD

LOG = logging.getLogger("sana_export.trt")

#: TensorRT's severities by name, and their levels in `logging`. TensorRT's INFO is a trace of the build.
LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG - 5,
}
#: Lines that tell a user nothing. Without a driver, an error about the driver follows every other error, though building needs no
#: driver. A cancelled build is logged as an error. The parser frames each node that it rejects. int64 inputs are in the contract,
#: and a graph without PAG layers has the input `perturbed` but does not read it.
NOISE = re.compile(
    r"catchCudaError|BuildCanceled|Thread context has not been set|(Begin|End) node ---"
    r"|unsupported in TensorRT-RTX|has Int64 binding|Unused Input: perturbed|Input Tensor perturbed is unused"
)
#: Source positions that TensorRT adds for its own developers.
_SOURCE_NOTES = re.compile(r"( In \w+ at \S+?:\d+)+|\[\w+\.cpp:\d+: \w+\] |^(ERROR: )?\w+\.cpp:\d+:? ")
#: The number of error lines that a `CollectedLog` keeps.
_MOST_ERRORS = 6
#: How a builder reports the memory that a run of the engine needs for activations.
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")


class CollectedLog:
    """What TensorRT said during one piece of work. Made by the `collect` of a logger."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=_MOST_ERRORS)
        self._activation_bytes = 0
        self._layers = ""

    @property
    def errors(self) -> list[str]:
        """The last error lines."""
        return list(self._errors)

    @property
    def activation_bytes(self) -> int:
        """The GPU memory that the engine needs for activations, as the builder reported it. 0 if it did not."""
        return self._activation_bytes

    @property
    def layers(self) -> str:
        """The builder's list of the engine's layers (layers.py). Empty if it made none."""
        return self._layers

    def add_error(self, line: str) -> None:
        """Keep an error line. May be called from any thread."""
        self._errors.append(line)

    def note_activations(self, count: int) -> None:
        """Keep the number of bytes that the builder reported."""
        self._activation_bytes = count

    def note_layers(self, text: str) -> None:
        """Keep the list of the engine's layers."""
        self._layers = text


class _OpenLogs:
    """The open `CollectedLog`s. TensorRT logs from the thread that called it, so each thread has its own stack of them."""

    def __init__(self) -> None:
        self._by_thread: dict[int, list[CollectedLog]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def collect(self) -> Iterator[CollectedLog]:
        """Open a log for what TensorRT says in this thread until the block ends; an outer log of the thread pauses meanwhile."""
        thread, log = threading.get_ident(), CollectedLog()
        with self._lock:
            self._by_thread.setdefault(thread, []).append(log)
        try:
            yield log
        finally:
            with self._lock:
                self._by_thread[thread].remove(log)
                if not self._by_thread[thread]:
                    del self._by_thread[thread]

    def current(self) -> list[CollectedLog]:
        """The log of this thread. For a thread of TensorRT's own, which nobody can assign, the current log of every thread."""
        with self._lock:
            own = self._by_thread.get(threading.get_ident())
            return [own[-1]] if own else [logs[-1] for logs in self._by_thread.values()]


@functools.cache
def logger_for(module: Any) -> Any:
    """The process's `ILogger` for `module`. In `with logger.collect() as log`, `log` is a `CollectedLog` of this thread."""
    severities = {member: LEVELS[name] for name, member in module.ILogger.Severity.__members__.items()}

    class Logger(module.ILogger):
        """Forwards to the logger "sana_export.trt" and to the open logs."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._open = _OpenLogs()

        def collect(self) -> contextlib.AbstractContextManager[CollectedLog]:
            return self._open.collect()

        def log(self, severity: Any, message: str) -> None:
            level = severities[severity]
            if found := _ACTIVATIONS.search(message):
                for log in self._open.current():
                    log.note_activations(int(found[1]))
            if message.startswith(HEAD):
                for log in self._open.current():
                    log.note_layers(message)
            if level < logging.WARNING:
                LOG.log(level, "%s", message)
                return
            text = readable(message)
            LOG.log(level if level < logging.ERROR and text else logging.DEBUG, "%s", text or message)
            if level >= logging.ERROR and text:
                for log in self._open.current():
                    log.add_error(text)

    return Logger()


def readable(message: str) -> str:
    """`message` without the lines and source positions that tell a user nothing. Empty if nothing is left."""
    lines = (line.strip() for line in message.splitlines() if not NOISE.search(line))
    return "\n".join(_SOURCE_NOTES.sub("", line).strip() for line in lines if line)
