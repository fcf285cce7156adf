"""Images that are answered as a URL: files under random names that are deleted after a while."""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time

from sana_export.files import disk_errors
from sana_export.serve.errors import Refusal

LOG = logging.getLogger(__name__)
#: What the names of the servers' own folders begin with.
_PREFIX = "sana-export-images-"
#: Random bytes in a name: who does not have the URL cannot guess it.
_NAME_BYTES = 24


@dataclass(frozen=True)
class UrlFile:
    """An image file."""

    path: Path
    media_type: str
    bytes: int
    #: When it is deleted, by the clock.
    until: float


class UrlFiles:
    """The files, the oldest first. Only files that were stored here are ever served, by name. For one event loop."""

    def __init__(self, folder: Path | None, seconds: float, most_bytes: int, clock: Callable[[], float] = monotonic) -> None:
        """Make a folder of this server's own in `folder`, or in the system's folder of temporary files.

        Raises DependencyError if the disk refuses.
        """
        self._seconds, self._most, self._clock, self._parent = seconds, most_bytes, clock, folder
        with disk_errors(folder or Path(tempfile.gettempdir())):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder, ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self._files: OrderedDict[str, UrlFile] = OrderedDict()
        #: Bytes of the files that are being written.
        self._writing = 0

    async def store(self, content: bytes, media_type: str) -> str:
        """Write a file in a thread, and return its name. Expired files are deleted first.

        Raises Refusal "disk_full" if the disk refuses, or if the files would take more than `most_bytes`.
        """
        self.expire()
        stored = sum(file.bytes for file in self._files.values())
        if len(content) + stored + self._writing > self._most:
            raise Refusal("disk_full", "the server has no room for more image files now; ask for b64_json", retry_after=60)
        name = f"{secrets.token_urlsafe(_NAME_BYTES)}.{media_type.rpartition('/')[2]}"
        path = self.folder / name
        self._writing += len(content)
        try:
            await asyncio.to_thread(_write, path, content)
        finally:
            self._writing -= len(content)
        self._files[name] = UrlFile(path, media_type, len(content), self._clock() + self._seconds)
        return name

    def find(self, name: str) -> UrlFile | None:
        """The file of a name that `store` returned, unless it has expired."""
        self.expire()
        return self._files.get(name)

    def expire(self) -> None:
        """Delete the files that have expired. What the disk refuses to delete is logged, and no longer served."""
        now = self._clock()
        while self._files and next(iter(self._files.values())).until <= now:
            _delete(self._files.popitem(last=False)[1].path)

    def expire_left(self) -> None:
        """Delete what servers that were killed have left in the same folder, if it is as old as expired files are.

        Only in a folder that the operator named: the system's folder of temporary files belongs to others too.
        """
        for path in self._parent.glob(f"{_PREFIX}*/*") if self._parent is not None else ():
            if path.parent != self.folder and not path.parent.is_symlink() and _age(path) > self._seconds:
                _delete(path)

    def close(self) -> None:
        """Delete all of them."""
        self._files.clear()
        self._folder.cleanup()


def _write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises Refusal "disk_full"."""
    try:
        path.write_bytes(content)
    except OSError as error:
        LOG.error("an image file cannot be written to %s: %s", path.parent, error)
        path.unlink(missing_ok=True)
        raise Refusal("disk_full", "the server cannot store the image file; ask for b64_json", retry_after=60) from error


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        LOG.error("an image file cannot be deleted: %s", error)


def _age(path: Path) -> float:
    """Seconds since a file was written. 0: it is gone."""
    try:
        return time() - path.stat().st_mtime
    except OSError:
        return 0.0
