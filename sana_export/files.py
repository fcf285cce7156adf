"""Files of a bundle: hashes, whole-file writes, locks between processes, and disk errors in the user's words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from sana_export.errors import ArtifactError, DependencyError
from sana_export.formats.recognize import not_what_was_wanted, recognize

Content = bytes | bytearray | memoryview

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
#: A temporary name begins with this many characters of the file's, so that it is not too long where the file's own is not.
_NAMED = 40
_FULL = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


def is_disk_error(error: OSError) -> bool:
    """Whether the disk refused: it is full or read-only, the folder is not writable, or a part of its path is a file."""
    return error.errno in _FULL | _REFUSED | {errno.ENOTDIR}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError raised while `path` is written into a DependencyError that names the cause."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DependencyError(
                f"the disk is full: {path} was not written",
                found=None if (free := free_bytes(path.parent)) is None else f"{free} bytes free",
                wanted="more space",
                fix="free some space and run the same command again: it continues where it stopped",
            ) from error
        reason = "not writable" if error.errno in _REFUSED else error.strerror or str(error)
        raise DependencyError(f"{path} cannot be written", found=reason, wanted=f"a writable folder {path.parent}") from error


def require_free(folder: Path, wanted: int, what: str) -> None:
    """Raise DependencyError unless `wanted` bytes are free for `what` on the disk of `folder`, or the system does not say."""
    free = free_bytes(folder)
    if free is not None and free < wanted:
        raise DependencyError(
            f"there is too little disk space for {what}",
            found=f"{free} bytes free at {folder}",
            wanted=f"{wanted} bytes",
            fix="free some space and run the same command again",
        )


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None, *, remove: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, against other processes and threads. If the process dies, the system frees it.

    If the lock is taken, `on_wait` is called once and this waits. If the file system does not support locks, this logs a warning
    and continues without one. `remove`: delete the file when the lock is released.
    """
    waited = False
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_without_links(str(path), os.O_RDWR | os.O_CREAT)
        try:
            while not _try_lock(descriptor, path):
                if not waited:
                    on_wait()
                    waited = True
                time.sleep(_POLL_SECONDS)
            if not _is_file(descriptor, path):  # its former owner removed it, so this lock is on a deleted file
                continue
            try:
                yield
            finally:
                if remove:
                    with contextlib.suppress(OSError):  # Windows does not remove an open file; it stays
                        path.unlink()
            return
        finally:
            os.close(descriptor)


def manifest_lock(bundle: Path) -> Path:
    """The lock file to hold while a manifest is loaded, changed and saved."""
    return bundle / ".locks" / "manifest"


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of `folder`, or of its nearest existing parent. None if the system does not say."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except (AttributeError, OSError):  # neither statvfs nor Windows, or a file system that refuses
        return None


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
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
        LOG.warning("%s cannot be locked (%s): do not let two processes write to this bundle at once", path, error)
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


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle."""

    #: Its path relative to the bundle, with forward slashes.
    path: str
    #: The sha256 of its content, in hex.
    sha256: str
    #: Its size.
    bytes: int


def file_entry(bundle: Path, path: Path) -> FileEntry:
    """The entry of the file at `path`, which is inside `bundle`."""
    return FileEntry(path.relative_to(bundle).as_posix(), hash_file(path), path.stat().st_size)


def hash_file(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(bundle: Path, entries: Iterable[FileEntry], *, fix: str) -> list[Path]:
    """Check that each of `entries` exists and has its size and hash. Returns the paths.

    Raises ArtifactError for the first file that fails, with `fix` as the command that fixes it.
    """
    paths = []
    for entry in entries:
        path = check_inside(bundle, entry.path, fix=fix)
        if not os.path.isfile(path):  # noqa: PTH113  # also a pipe, which could be read without end; pathlib raises for long names
            raise ArtifactError(f"{entry.path} is missing from {bundle}", found="no such file", wanted=entry.path, fix=fix)
        size = path.stat().st_size
        digest = hash_file(path) if size == entry.bytes else None
        if digest != entry.sha256 and leads_outside(bundle, path):  # say nothing about a file that is not the bundle's
            raise ArtifactError(
                f"{entry.path} is a link to a file outside the bundle that is not the one in its manifest",
                found="a link",
                wanted=f"sha256 {entry.sha256[:16]}...",
                fix=fix,
            )
        if digest is None:
            if (kind := recognize(path)) is not None and kind.stands_in:
                raise not_what_was_wanted(path, f"the file of {entry.bytes} bytes that the manifest lists", kind.name, fix=fix)
            raise ArtifactError(f"{entry.path} is damaged", found=f"{size} bytes", wanted=f"{entry.bytes} bytes", fix=fix)
        if digest != entry.sha256:
            raise ArtifactError(
                f"{entry.path} is damaged or was replaced",
                found=f"sha256 {digest[:16]}...",
                wanted=f"sha256 {entry.sha256[:16]}...",
                fix=fix,
            )
        paths.append(path)
    return paths


def check_inside(bundle: Path, relative: str, *, fix: str) -> Path:
    """`bundle / relative`. Raises ArtifactError if that names a place outside the bundle, by `..`, a drive or an absolute path.

    It may be a link that leads outside, as every file in the hub's cache is. Whoever reads the file checks its hash first, so only
    a file that the manifest knows is used.
    """
    parts = PurePosixPath(relative).parts
    windows = PureWindowsPath(relative)
    outside = not parts or ".." in (*parts, *windows.parts) or bool(windows.anchor) or PurePosixPath(relative).is_absolute()
    if outside or "\0" in relative:
        raise ArtifactError(f"the bundle {bundle} names a file outside itself", found=relative, wanted="a path inside it", fix=fix)
    return bundle.joinpath(*parts)


def leads_outside(bundle: Path, path: Path) -> bool:
    """Whether `path`, which is in the bundle, is a link to a file outside it."""
    return not real_path(path).is_relative_to(real_path(bundle))


def real_path(path: Path) -> Path:
    """The absolute path without links. Links that lead in a circle stay, for which `Path.resolve` raises RuntimeError."""
    return Path(os.path.realpath(path))


def read_unlisted(path: Path) -> bytes | None:
    """The content of a file in a bundle that the manifest does not list, such as a cache. None if there is none.

    A link is not followed: nothing says what the file behind it is.
    """
    try:
        with open(path, "rb", opener=_open_without_links) as file:
            return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None


def _open_without_links(path: str, flags: int) -> int:
    """Open a file, but not what a link points to, and without waiting for the other end of a pipe."""
    if os.path.islink(path):  # noqa: PTH114
        raise FileNotFoundError(errno.ENOENT, "a link", path)
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def write_whole(path: Path, content: str | Content | Callable[[BinaryIO], object]) -> None:
    """Write `content` (text as UTF-8, bytes, or a function that writes to the open file) to `path`, whole or not at all.

    The file is written under a temporary name in the same folder and then renamed, so an interrupted write leaves the old file.
    Raises DependencyError if the disk is full or the folder is not writable.
    """
    partial = path.with_name(f".{path.name[:_NAMED]}.{os.getpid()}-{threading.get_ident()}.partial")
    with disk_errors(path):
        try:
            with partial.open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):  # it must not replace the error of the write
                partial.unlink()


def partial_path(destination: Path) -> Path:
    """The temporary name of an engine during its build. It is fixed, so that the next build finds what a killed one left."""
    return destination.with_name(f".{destination.name}.partial")
