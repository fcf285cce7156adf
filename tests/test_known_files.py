"""Files that were hashed before: when a record spares the hash, and when it must not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sana_export import files, known_files
from sana_export.errors import ArtifactError
from sana_export.files import FileEntry, file_entry
from sana_export.known_files import SWITCH, check_known_files, hash_always, record_path
from tests.support.hashes import Hashes

CONTENT = b"weights " * 1000
DAMAGED = CONTENT[:-1] + b"!"
#: More than the resolution of a file system's times.
TICK_SECONDS = 0.02


@pytest.fixture
def entry(tmp_path: Path, hashes: Hashes) -> FileEntry:
    """One file of the bundle `tmp_path / "bundle"`."""
    path = tmp_path / "bundle" / "model.engine"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    time.sleep(TICK_SECONDS)
    found = file_entry(tmp_path / "bundle", path)
    hashes.restart()
    return found


def check(bundle: Path, entry: FileEntry) -> list[Path]:
    return check_known_files(bundle, [entry], fix="the command that fixes it")


def test_a_file_is_hashed_once_and_its_record_is_outside_the_bundle(tmp_path, entry, hashes):
    bundle = tmp_path / "bundle"
    for expected in (["model.engine"], [], []):
        assert check(bundle, entry) == [bundle / entry.path]
        assert check(bundle, entry) == [bundle / entry.path]
        assert hashes == expected
        hashes.restart()
    assert [path.name for path in bundle.rglob("*")] == ["model.engine"]
    record, found = record_path(bundle / entry.path), (bundle / entry.path).stat()
    assert json.loads(record.read_text()) == {
        "path": str(bundle / entry.path),
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": entry.bytes,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "sha256": entry.sha256,
    }
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [record]
    assert record.parent.stat().st_mode & 0o777 == 0o700


def overwrite(path: Path) -> None:
    """Another content of the same size, with the old times as far as a program can set them."""
    before = path.stat()
    path.write_bytes(DAMAGED)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file of the same size and times at this place."""
    other = path.with_name("other")
    other.write_bytes(DAMAGED)
    shutil.copystat(path, other)
    other.replace(path)


def link(path: Path) -> None:
    """A link to another file of the bundle, with the same size and times."""
    other = path.with_name("other")
    other.write_bytes(DAMAGED)
    shutil.copystat(path, other)
    path.unlink()
    path.symlink_to(other)


def move_back(path: Path) -> None:
    """An older file is renamed to this place: its content did not change, but its inode did."""
    other = path.with_name("other")
    path.rename(other)
    path.write_bytes(DAMAGED)
    shutil.copystat(other, path)


def shorten(path: Path) -> None:
    path.write_bytes(CONTENT[:-1])


@pytest.mark.parametrize("tamper", [overwrite, replace, link, move_back, shorten])
@pytest.mark.parametrize("new_process", [False, True])
def test_a_changed_file_is_refused(tmp_path, entry, tamper: Callable[[Path], None], new_process, hashes):
    bundle = tmp_path / "bundle"
    check(bundle, entry)
    tamper(bundle / entry.path)
    for _ in range(2):
        if new_process:
            hashes.restart()
        with pytest.raises(ArtifactError, match="is damaged") as refused:
            check(bundle, entry)
        assert refused.value.fix == "the command that fixes it"


def test_a_missing_file_is_refused(tmp_path, entry):
    check(tmp_path / "bundle", entry)
    (tmp_path / "bundle" / entry.path).unlink()
    with pytest.raises(ArtifactError, match="is missing from"):
        check(tmp_path / "bundle", entry)


def test_a_record_holds_for_one_hash_and_one_place(tmp_path, entry, hashes):
    bundle = tmp_path / "bundle"
    for other in (FileEntry(entry.path, "0" * 64, entry.bytes), FileEntry(entry.path, entry.sha256, entry.bytes + 1)):
        check(bundle, entry)
        hashes.restart()
        with pytest.raises(ArtifactError, match="is damaged"):
            check(bundle, other)
    check(bundle, entry)
    bundle.rename(tmp_path / "moved")
    hashes.restart()
    check(tmp_path / "moved", entry)
    assert hashes == ["model.engine"]


def test_files_outside_the_bundle_are_refused(tmp_path, entry):
    (tmp_path / "outside").write_bytes(CONTENT)
    with pytest.raises(ArtifactError, match="outside itself"):
        check(tmp_path / "bundle", FileEntry("../outside", entry.sha256, entry.bytes))


def forge(bundle: Path, entry: FileEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage the file, with a record that says that it was found right: what a disk that loses bits leaves."""
    (bundle / entry.path).write_bytes(DAMAGED)
    time.sleep(TICK_SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(files, "hash_file", lambda path: entry.sha256)
        check(bundle, entry)
    assert check(bundle, entry)


@pytest.mark.parametrize("by", ["variable", "block"])
def test_the_switch_hashes_and_forgets_a_wrong_record(tmp_path, entry, by, monkeypatch):
    bundle = tmp_path / "bundle"
    forge(bundle, entry, monkeypatch)
    with monkeypatch.context() as patch:
        if by == "variable":
            patch.setenv(SWITCH, "1")
            with pytest.raises(ArtifactError, match="damaged or was replaced"):
                check(bundle, entry)
        else:
            with hash_always(), pytest.raises(ArtifactError, match="damaged or was replaced"):
                check(bundle, entry)
    assert not record_path(bundle / entry.path).exists()
    with pytest.raises(ArtifactError, match="damaged or was replaced"):
        check(bundle, entry)


def test_the_switch_hashes_every_time(tmp_path, entry, hashes):
    with hash_always():
        check(tmp_path / "bundle", entry)
        check(tmp_path / "bundle", entry)
    assert hashes == ["model.engine"] * 2
    check(tmp_path / "bundle", entry)
    assert hashes == ["model.engine"] * 2


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null"])
def test_a_damaged_record_is_ignored_and_replaced(tmp_path, entry, content, hashes):
    bundle = tmp_path / "bundle"
    check(bundle, entry)
    record = record_path(bundle / entry.path)
    whole = record.read_bytes()
    for damage in (content, whole[:-1], whole.replace(b'"inode"', b'"other"')):
        record.write_bytes(damage)
        hashes.restart()
        check(bundle, entry)
        assert hashes == ["model.engine"]
        assert record.read_bytes() == whole


@pytest.mark.parametrize("whose", ["open to the group", "another user's", "a link"])
def test_records_that_others_can_write_are_ignored(tmp_path, entry, whose, hashes, monkeypatch):
    bundle = tmp_path / "bundle"
    check(bundle, entry)
    folder = record_path(bundle / entry.path).parent
    if whose == "open to the group":
        folder.chmod(0o770)
    elif whose == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    record = record_path(bundle / entry.path)
    written = record.stat().st_ino
    for _ in range(2):
        hashes.restart()
        check(bundle, entry)
        assert hashes == ["model.engine"]
    assert record.stat().st_ino == written, "nothing is written there either"
    record.unlink()
    hashes.restart()
    check(bundle, entry)
    assert not record.exists()


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("obstacle", ["read-only", "a file", "no home"])
def test_without_a_cache_folder_each_process_hashes_once(tmp_path, entry, obstacle, hashes, monkeypatch):
    if obstacle == "read-only":
        monkeypatch.setattr(Path, "mkdir", refuse)
    elif obstacle == "a file":
        (tmp_path / "cache").write_text("a file")
    else:
        monkeypatch.delenv("SANA_EXPORT_CACHE")
        monkeypatch.setattr(Path, "expanduser", no_home)
    check(tmp_path / "bundle", entry)
    check(tmp_path / "bundle", entry)
    assert hashes == ["model.engine"]
    hashes.restart()
    check(tmp_path / "bundle", entry)
    assert hashes == ["model.engine"]


def test_a_file_that_has_just_changed_is_not_recorded(tmp_path, entry, hashes, monkeypatch):
    monkeypatch.setattr(known_files, "SETTLED_NS", 3600 * 10**9)
    check(tmp_path / "bundle", entry)
    check(tmp_path / "bundle", entry)
    assert hashes == ["model.engine"] * 2
    assert not record_path(tmp_path / "bundle" / entry.path).exists()


def test_a_file_that_changes_while_it_is_hashed_has_no_record(tmp_path, entry, monkeypatch):
    def hash_file(path: Path) -> str:
        path.write_bytes(DAMAGED)
        return entry.sha256

    with monkeypatch.context() as patch:
        patch.setattr(files, "hash_file", hash_file)
        check(tmp_path / "bundle", entry)
    with pytest.raises(ArtifactError, match="damaged or was replaced"):
        check(tmp_path / "bundle", entry)


def test_a_system_without_change_times_keeps_no_records(tmp_path, entry, hashes, monkeypatch):
    monkeypatch.setattr(known_files, "HAS_CHANGE_TIME", False)
    check(tmp_path / "bundle", entry)
    check(tmp_path / "bundle", entry)
    assert hashes == ["model.engine"] * 2


def test_a_block_that_hashes_is_for_its_own_thread(tmp_path, entry, hashes):
    check(tmp_path / "bundle", entry)
    with hash_always():
        thread = threading.Thread(target=check, args=(tmp_path / "bundle", entry))
        thread.start()
        thread.join()
    assert hashes == ["model.engine"]


PROGRAM = """
import sys
from pathlib import Path
from sana_export import known_files
from sana_export.files import FileEntry

known_files.SETTLED_NS = 0
bundle, path, sha256, size = sys.argv[1:]
for _ in range(200):
    known_files.records.clear()
    known_files.check_known_files(Path(bundle), [FileEntry(path, sha256, int(size))], fix="")
    known_files.record_path(Path(bundle, path)).unlink(missing_ok=True)
"""


def test_processes_may_check_one_file_at_once(tmp_path, entry):
    bundle = tmp_path / "bundle"
    arguments = [sys.executable, "-c", PROGRAM, str(bundle), entry.path, entry.sha256, str(entry.bytes)]
    children = [subprocess.Popen(arguments, stderr=subprocess.PIPE) for _ in range(3)]
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors.decode()
    check(bundle, entry)
    record = record_path(bundle / entry.path)
    assert list(record.parent.iterdir()) == [record]
