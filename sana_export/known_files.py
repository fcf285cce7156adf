"""Files that were hashed before and have not changed since. They are not hashed again, which takes seconds for each gigabyte.

Records of them are in the user's cache folder, never in a bundle, so no bundle brings its own. A record is a small file that says
which file had which hash, and what the file system said of it then: device, inode, size, and the times of the last change of its
content and of its inode. Programs cannot set the latter. A record counts only if all of that is still the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

from sana_export.environment import cache_folder
from sana_export.errors import ArtifactError, DependencyError
from sana_export.files import FileEntry, check_files, check_inside, real_path, write_whole

LOG = logging.getLogger(__name__)

#: If this environment variable is set, no record counts.
SWITCH = "SANA_EXPORT_REHASH"
#: A file that changed more recently is not recorded: within the resolution of the clock, it could change again unnoticed.
SETTLED_NS = 3_000_000_000
#: Windows reports no time of the last change of an inode, so nothing is recorded there.
HAS_CHANGE_TIME = os.name == "posix" and hasattr(os, "geteuid")

_hash_always: ContextVar[bool] = ContextVar("hash_always", default=False)
#: The records of this process, for one that cannot write to the cache folder and loads graphs again and again.
records: set[str] = set()


def check_known_files(bundle: Path, entries: Iterable[FileEntry], *, fix: str) -> list[Path]:
    """As `files.check_files`, but a file that passed before and has not changed since is not hashed again."""
    return [_check(bundle, entry, fix) for entry in entries]


@contextlib.contextmanager
def hash_always() -> Iterator[None]:
    """Within this block and thread, `check_known_files` hashes every file."""
    token = _hash_always.set(True)
    try:
        yield
    finally:
        _hash_always.reset(token)


def record_path(path: Path) -> Path:
    """Where the record of the file at `path` is."""
    name = hashlib.sha256(os.fsencode(real_path(path))).hexdigest()
    return cache_folder() / "known-files" / f"{name}.json"


def _check(bundle: Path, entry: FileEntry, fix: str) -> Path:
    path = check_inside(bundle, entry.path, fix=fix)
    record = _describe(path, entry)
    if record is not None and not (_hash_always.get() or os.environ.get(SWITCH)) and _is_known(path, record):
        return path
    try:
        check_files(bundle, [entry], fix=fix)
    except ArtifactError:
        _forget(path, record)
        raise
    if record is not None:  # it says what the file was before, so a change meanwhile makes it worthless
        _remember(path, record)
    return path


def _describe(path: Path, entry: FileEntry) -> str | None:
    """The record of the file at `path`, as it is now, if it has the hash of `entry`. None for a file that cannot have one."""
    try:
        found = path.stat()
    except OSError:
        return None
    settled = max(found.st_mtime_ns, found.st_ctime_ns) < time.time_ns() - SETTLED_NS
    if not (HAS_CHANGE_TIME and settled and found.st_size == entry.bytes):
        return None
    facts = {
        "path": str(real_path(path)),
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "sha256": entry.sha256,
    }
    return json.dumps(facts)


def _is_known(path: Path, record: str) -> bool:
    if record in records:
        return True
    try:
        place = record_path(path)
        return _is_private(place.parent) and place.read_bytes() == record.encode()
    except (OSError, DependencyError):  # no record, or no home folder
        return False


def _remember(path: Path, record: str) -> None:
    records.add(record)
    try:
        place = record_path(path)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(place.parent):
            write_whole(place, record)
        else:
            LOG.debug("%s belongs to another user or is open to others: no record is kept there", place.parent)
    except (OSError, DependencyError) as error:  # it only saves time
        LOG.debug("%s will be hashed again at the next start: %s", path, error)


def _forget(path: Path, record: str | None) -> None:
    if record is not None:
        records.discard(record)
    with contextlib.suppress(OSError, DependencyError):
        record_path(path).unlink()


def _is_private(folder: Path) -> bool:
    """Whether only the user of this process can write to `folder` and open what is in it."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
