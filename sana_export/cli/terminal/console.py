"""Everything on stderr: log records, and a progress line that is redrawn if stderr is a terminal."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from sana_export.progress import Progress

#: Log levels of stderr by verbosity. A verb's default is VERBOSE or QUIET.
VERBOSE, QUIET, SILENT, EVERYTHING = logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG
#: Packages whose log records are of no use to our users.
NOISY = (
    "torch",
    "transformers",
    "diffusers",
    "onnxscript",
    "onnx_ir",
    "huggingface_hub",
    "httpx",
    "httpx2",
    "accelerate",
    "uvicorn",
)
_REDRAW_SECONDS = 0.1


class Console:
    """Writes whole lines to `stream`, above at most one progress line. Thread-safe."""

    def __init__(self, stream: TextIO | None = None, level: int = QUIET) -> None:
        #: Where to write; stderr by default.
        self.stream = sys.stderr if stream is None else stream
        #: The lowest level of log records to show.
        self.level = level
        #: Whether progress is drawn as a bar.
        self.live = self.stream.isatty() and level < SILENT
        #: Text in front of every step.
        self.prefix = ""
        self._shown = ""
        self._last: object = None
        self._drawn = 0.0
        self._lock = threading.RLock()

    def line(self, text: str) -> None:
        """Write `text` as lines of its own."""
        with self._lock:
            self.clear()
            self.stream.write(text + "\n")
            self.stream.flush()

    def step(self, doing: str, done: int, total: int, fraction: float | None = None) -> None:
        """Show that step `done` + 1 of `total`, called `doing`, is running and is `fraction` (0 to 1) complete.

        A terminal shows a bar that is redrawn. Otherwise each step is one line, unless the level hides it.
        """
        text = f"{self.prefix}[{done + 1}/{total}] {doing}"
        with self._lock:
            if done >= total:
                self.clear()
                return
            changed, self._last = self._last != text, text
            if not self.live:
                if changed and self.level <= VERBOSE:
                    self.line(text)
                return
            now = time.monotonic()
            if not changed and now - self._drawn < _REDRAW_SECONDS:
                return
            self._drawn = now
            self._draw(f"{bar((done + (fraction or 0.0)) / total)} {text}" + ("" if fraction is None else f" {fraction:.0%}"))

    def show(self, progress: Progress) -> None:
        """Show the current step of a running call; its fraction is shown only if it is known."""
        done, fraction = divmod(progress.done, 1)
        self.step(progress.doing, int(done), int(progress.total), fraction or None)

    def clear(self) -> None:
        """Remove the progress line from the terminal."""
        with self._lock:
            if self._shown:
                self.stream.write("\r\x1b[K")
                self.stream.flush()
                self._shown = ""

    def _draw(self, text: str) -> None:
        self.clear()
        self._shown = shortened(text, shutil.get_terminal_size().columns - 1)
        self.stream.write(self._shown)
        self.stream.flush()


def shortened(text: str, columns: int) -> str:
    """As much of `text` as fits into `columns` of a terminal. East Asian characters and emoji are two columns wide."""
    used = 0
    for index, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:index]
    return text


def bar(fraction: float, width: int = 20) -> str:
    """A bar of `width` characters, filled to `fraction` (0 to 1)."""
    full = round(width * min(max(fraction, 0.0), 1.0))
    return "[" + "#" * full + "." * (width - full) + "]"


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        trace = "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip() if record.exc_info else ""
        self.console.line(prefix + record.getMessage() + trace)


@contextmanager
def logging_to(console: Console, *, everything: bool) -> Iterator[None]:
    """Show sana_export's log records of the console's level and above. Unless `everything`, show only errors of other packages.

    The levels of all loggers are restored at the end.
    """
    ours, handler = logging.getLogger("sana_export"), _Handler(console)
    levels = {ours: console.level}
    if not everything:
        levels |= {logging.getLogger(name): logging.ERROR for name in NOISY}
    previous = {logger: logger.level for logger in levels}
    ours.addHandler(handler)
    try:
        for logger, level in levels.items():
            logger.setLevel(level)
        with warnings.catch_warnings():
            if not everything:
                warnings.simplefilter("ignore")
            yield
    finally:
        console.clear()
        ours.removeHandler(handler)
        for logger, level in previous.items():
            logger.setLevel(level)
