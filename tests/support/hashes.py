"""Which files are hashed, in a process that starts anew whenever a test says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_export import files, known_files


class Hashes(list[str]):
    """The names of the files that were hashed, in order. The cache folder is empty, and files count as settled at once."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._monkeypatch, self._hash_file = monkeypatch, files.hash_file
        monkeypatch.setenv("SANA_EXPORT_CACHE", str(cache))
        monkeypatch.delenv(known_files.SWITCH, raising=False)
        monkeypatch.setattr(known_files, "SETTLED_NS", 0)
        monkeypatch.setattr(files, "hash_file", self._hash)
        self.restart()

    def restart(self) -> None:
        """Forget what was hashed, and leave what a new process knows: the records in the cache folder."""
        self.clear()
        self._monkeypatch.setattr(known_files, "records", set())

    def _hash(self, path: Path) -> str:
        self.append(path.name)
        return self._hash_file(path)
