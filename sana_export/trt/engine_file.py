"""The file that a builder streams an engine into."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sana_export.files import disk_errors, partial_path


class EngineFile:
    """A file that is written under a temporary name until `keep()` renames it. Without `keep()`, leaving the block deletes it."""

    def __init__(self, destination: Path, cancelled: Callable[[], bool]) -> None:
        #: The engine's own name.
        self.destination = destination
        #: Size of what was written.
        self.bytes = 0
        #: The error of a failed write. `keep` raises it as a DependencyError.
        self.refused: OSError | None = None
        self._partial, self._cancelled = partial_path(destination), cancelled
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    @property
    def sha256(self) -> str:
        """The hash of what was written, in hex."""
        return self._hash.hexdigest()

    def __enter__(self) -> EngineFile:
        with disk_errors(self.destination):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a failure to flush what is deleted anyway
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(FileNotFoundError):  # `keep` has renamed it
            self._partial.unlink()

    def write(self, data: Any) -> int:
        """Append `data` and return the number of bytes written: 0 after a disk error or if the build is cancelled."""
        if self._file is None or self.refused is not None or self._cancelled():
            return 0
        try:
            self._file.write(data)
        except OSError as error:  # the builder calls this, and exceptions must not pass through it
            self.refused = error
            return 0
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def keep(self) -> None:
        """Close the file and rename it to `destination`."""
        with disk_errors(self.destination):
            if self.refused is not None:
                raise self.refused
            if self._file is not None:
                self._file.close()
            self._partial.replace(self.destination)
