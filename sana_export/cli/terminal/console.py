"""stderr as one writer: log records, and a line of progress that is redrawn where stderr is a terminal."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from sana_export.progress import Progress

#: Levels of stderr by verbosity; a verb chooses VERBOSE or QUIET as its default.
VERBOSE, QUIET, SILENT, EVERYTHING = logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG
#: Packages that log what is of no use to a user of ours.
NOISY = ("torch", "transformers", "diffusers", "onnxscript", "onnx_ir", "huggingface_hub", "httpx", "accelerate")
_REDRAW_SECONDS = 0.1


class Console:
    """Writes whole lines to `stream`, over at most one line of progress. Thread-safe."""

    def __init__(self, stream: TextIO | None = None, level: int = QUIET) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.level = level
        self.live = self.stream.isatty() and level < SILENT
        self.prefix = ""
        self._shown = ""
        self._last: object = None
        self._drawn = 0.0
        self._lock = threading.RLock()

    def line(self, text: str) -> None:
        """Write `text` as lines of their own."""
        with self._lock:
            self.clear()
            self.stream.write(text + "\n")
            self.stream.flush()

    def step(self, doing: str, done: int, total: int, fraction: float | None = None) -> None:
        """Step `done` + 1 of `total` is under way and is called `doing`; `fraction` (0 to 1) says how far it is.

        A terminal shows it as a bar that is redrawn; elsewhere each step is one line, where the level lets it through.
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
        """Take the line of progress off the terminal."""
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
    """As much of `text` as fits into `columns` of a terminal, where East Asian characters and emoji take two."""
    used = 0
    for index, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:index]
    return text


def bar(fraction: float, width: int = 20) -> str:
    """A bar of `width` characters, `fraction` (0 to 1) of it full."""
    full = round(width * min(max(fraction, 0.0), 1.0))
    return "[" + "#" * full + "." * (width - full) + "]"


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.console.line(prefix + record.getMessage())


@contextmanager
def logging_to(console: Console, *, everything: bool) -> Iterator[None]:
    """Show the records of sana_export on `console` from its level on; of other packages only errors, unless `everything`."""
    ours = logging.getLogger("sana_export")
    handler, level = _Handler(console), ours.level
    ours.addHandler(handler)
    ours.setLevel(console.level)
    try:
        with warnings.catch_warnings():
            if not everything:
                warnings.simplefilter("ignore")
                for name in NOISY:
                    logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        console.clear()
        ours.removeHandler(handler)
        ours.setLevel(level)
