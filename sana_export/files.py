"""The disk under a bundle: its failures in the user's words, and locks between processes that write into one bundle."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sana_export.errors import DependencyError

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_FULL = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into a DependencyError that says what the disk lacks."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DependencyError(
                f"the disk is full: {path} was not written",
                found=f"{free_bytes(path.parent)} bytes free",
                wanted="more space",
                fix="free some space and run the same command again: it goes on where it stopped",
            ) from error
        reason = "not writable" if error.errno in _REFUSED else error.strerror or str(error)
        raise DependencyError(f"{path} cannot be written", found=reason, wanted=f"a writable folder {path.parent}") from error


def require_free(folder: Path, wanted: int, what: str) -> None:
    """Raise DependencyError unless the disk of `folder` has `wanted` bytes free for `what`."""
    if (free := free_bytes(folder)) < wanted:
        raise DependencyError(
            f"there is too little disk space for {what}",
            found=f"{free} bytes free at {folder}",
            wanted=f"{wanted} bytes",
            fix="free some space and run the same command again",
        )


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None, *, remove: bool = False) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread; the system frees it when a process dies.

    Waits for the holder and calls `on_wait` once before it does. Where the file system knows no locks it goes on
    without, with a warning. `remove`: the file goes when the lock is given back.
    """
    waited = False
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not _try_lock(descriptor, path):
                if not waited:
                    on_wait()
                    waited = True
                time.sleep(_POLL_SECONDS)
            if not _is_file(descriptor, path):  # the holder removed it, and the next one locks another of that name
                continue
            try:
                yield
            finally:
                if remove:
                    with contextlib.suppress(OSError):  # Windows removes no file that is open; then it stays
                        path.unlink()
            return
        finally:
            os.close(descriptor)


def manifest_lock(bundle: Path) -> Path:
    """The lock file to hold from loading a manifest to saving its successor."""
    return bundle / ".locks" / "manifest"


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` or its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        _lock_nonblocking(descriptor)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        LOG.warning("%s cannot be locked (%s): do not write into this bundle twice at a time", path, error)
    return True


try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    def _lock_nonblocking(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]

else:

    def _lock_nonblocking(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
