"""Free disk space, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import BinaryIO

import pytest

from sana_export.errors import DependencyError
from sana_export.files import free_bytes, require_free, write_whole

Usage = namedtuple("Usage", "total used free")


def test_free_space_does_not_need_statvfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no `os.statvfs`. A folder that does not exist yet will be on its parent's disk."""
    asked: list[Path] = []

    def disk_usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(10, 3, 7)

    monkeypatch.delattr(os, "statvfs", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert free_bytes(tmp_path / "not" / "there") == 7
    assert asked == [tmp_path]
    require_free(tmp_path, 7, "the bundle")
    with pytest.raises(DependencyError, match="too little disk space for the bundle") as caught:
        require_free(tmp_path, 8, "the bundle")
    assert (caught.value.found, caught.value.wanted) == (f"7 bytes free at {tmp_path}", "8 bytes")


@pytest.mark.parametrize("content", ["grün\n", "grün\n".encode(), lambda file: file.write("grün\n".encode())])
def test_a_file_is_written_whole(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    write_whole(path, content)  # type: ignore[arg-type]
    assert path.read_bytes() == "grün\n".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("error", "message"), [(OSError(errno.ENOSPC, "No space left on device"), "the disk is full"), (KeyboardInterrupt(), None)]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException, message: str | None) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def half(file: BinaryIO) -> None:
        file.write(b"ne")
        raise error

    with pytest.raises(DependencyError if message else KeyboardInterrupt, match=message):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
