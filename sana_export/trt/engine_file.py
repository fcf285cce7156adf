"""The file that a builder streams an engine into."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sana_export.files import disk_errors, partial_path


class EngineFile:
    """A file that grows under a partial name and takes its own name by `keep()`; it leaves nothing otherwise.

    `refused` is what the disk said to a write; `keep` raises it as a DependencyError.
    """

    def __init__(self, destination: Path, cancelled: Callable[[], bool]) -> None:
        self.destination, self.partial, self.cancelled = destination, partial_path(destination), cancelled
        self.bytes = 0
        self.refused: OSError | None = None
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> EngineFile:
        with disk_errors(self.destination):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a failure to flush what is thrown away anyway
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(FileNotFoundError):  # it has its own name by now
            self.partial.unlink()

    def write(self, data: Any) -> int:
        """Append `data`; returns the number of bytes taken: fewer than given where the disk refuses or the build is over."""
        if self._file is None or self.refused is not None or self.cancelled():
            return 0
        try:
            self._file.write(data)
        except OSError as error:  # nothing may be raised through the builder, which calls this
            self.refused = error
            return 0
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def keep(self) -> None:
        """Close the file and give it its name."""
        with disk_errors(self.destination):
            if self.refused is not None:
                raise self.refused
            if self._file is not None:
                self._file.close()
            self.partial.replace(self.destination)
