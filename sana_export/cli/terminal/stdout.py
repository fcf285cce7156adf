"""Keeps stdout for a verb's answer. What libraries print, to `sys.stdout` or to file descriptor 1, goes to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO


def open_streams() -> None:
    """Open the null device in place of each standard stream that the caller has closed (`>&-`).

    Otherwise the next file that is opened gets the stream's descriptor, and what a library prints ends up in that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123


class Stdout:
    """Writes the answer as one JSON document or as text."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stream: TextIO = sys.stdout

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Send everything else that is written to stdout in this block to stderr."""
        stream = self._stream
        try:
            descriptor = stream.fileno()
        except (AttributeError, io.UnsupportedOperation):  # the caller replaced sys.stdout
            with redirect_stdout(sys.stderr):
                yield
            return
        stream.flush()
        with open(os.dup(descriptor), "w", encoding=stream.encoding, errors=stream.errors) as kept:  # noqa: PTH123
            self._stream = kept
            os.dup2(2, descriptor)
            try:
                with redirect_stdout(sys.stderr):
                    yield
            finally:
                os.dup2(kept.fileno(), descriptor)
                self._stream = stream

    def write(self, document: Mapping[str, Any], text: str) -> None:
        """Write the answer. A closed pipe (`| head`) is not an error. Raises OSError if the disk is full."""
        content = json.dumps(document, indent=1, default=str) if self.as_json else text.rstrip("\n")
        if not content:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(content.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            self._stream.flush()
        except OSError as error:
            # The interpreter flushes stdout once more at its end. That must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise

    def write_json(self, document: Mapping[str, Any]) -> None:
        """Write `document` if JSON was asked for."""
        if self.as_json:
            self.write(document, "")
