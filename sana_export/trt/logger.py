"""TensorRT's log, forwarded to `logging`, with the last errors kept for the message that the user sees.

TensorRT keeps one logger a process: whoever creates a builder or runtime while another is alive is given the first
one's logger. So there is one logger a module here, shared by all.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections import deque
from typing import Any

LOG = logging.getLogger("sana_export.trt")

#: TensorRT's severities, by name, and what they are in `logging`. Its INFO is a trace of the build.
LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG - 5,
}
#: Lines that say nothing to a user: without a driver every error is followed by one about the driver, though building needs
#: none; a cancelled build reports its cancellation as an error; the parser frames each node it dislikes; it reminds of int64
#: inputs, which the contract states, and of `perturbed`, which a graph without PAG layers takes and does not read.
NOISE = re.compile(
    r"catchCudaError|BuildCanceled|Thread context has not been set|(Begin|End) node ---"
    r"|unsupported in TensorRT-RTX|has Int64 binding|Unused Input: perturbed|Input Tensor perturbed is unused"
)
#: What TensorRT appends or prepends for its own developers.
_SOURCE_NOTES = re.compile(r"( In \w+ at \S+?:\d+)+|\[\w+\.cpp:\d+: \w+\] |^(ERROR: )?\w+\.cpp:\d+:? ")
_KEPT = 6
#: How a builder says what a run of the engine works in.
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")


class _Errors:
    """The last error lines, from any thread."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        with self._lock:
            lines = list(self._lines)
            self._lines.clear()
        return lines


@functools.cache
def logger_for(module: Any) -> Any:
    """The process's logger for `module`, an `ILogger` with `errors.take()`: the error lines since the last call."""
    severities = {member: LEVELS[name] for name, member in module.ILogger.Severity.__members__.items()}

    class Logger(module.ILogger):
        """Forwards to the logger "sana_export.trt"."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors = _Errors()
            #: Bytes, as the last build said.
            self.activation_bytes = 0

        def log(self, severity: Any, message: str) -> None:
            level = severities[severity]
            if found := _ACTIVATIONS.search(message):
                self.activation_bytes = int(found[1])
            if level < logging.WARNING:
                LOG.log(level, "%s", message)
                return
            text = readable(message)
            LOG.log(level if level < logging.ERROR and text else logging.DEBUG, "%s", text or message)
            if level >= logging.ERROR and text:
                self.errors.add(text)

    return Logger()


def readable(message: str) -> str:
    """`message` without the lines and source positions that say nothing to a user; empty where nothing is left."""
    lines = (line.strip() for line in message.splitlines() if not NOISE.search(line))
    return "\n".join(_SOURCE_NOTES.sub("", line).strip() for line in lines if line)
