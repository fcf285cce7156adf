"""The place of a folder that is written whole: first under a temporary name, then with its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sana_export.errors import UsageError
from sana_export.files import disk_errors, real_path


@dataclass(frozen=True)
class OutputFolder:
    """Where a folder is written first, and where it goes. All paths are on one disk."""

    #: The folder itself. It may not exist yet.
    folder: Path
    #: Where its content is written first.
    partial: Path
    #: Where the content that it replaces is for a moment.
    old: Path
    #: The lock file to hold meanwhile.
    lock: Path
    #: Whether `partial`, `old` and `lock` are inside the folder, because the folder itself cannot be renamed.
    inside: bool

    @classmethod
    def of(cls, folder: Path, tag: str = "") -> OutputFolder:
        """The place of `folder`. A link is followed, so that the content goes where the link points. `tag` becomes part of the
        temporary names.

        A folder is written beside itself and renamed. That fails for a mounted disk, and for a folder whose parent is not writable;
        and a shell whose current folder is replaced is left in a deleted one. Such a folder is written inside itself.

        Raises UsageError for a link that leads in a circle.
        """
        if folder.is_symlink() or folder.name in ("", ".."):
            folder = real_path(folder)
            if folder.is_symlink():
                raise UsageError(f"{folder} is a link that leads in a circle", wanted="a folder, or a name that is free")
        inside = folder.is_dir() and (
            os.path.ismount(folder) or not os.access(folder.parent, os.W_OK) or _is_current(folder) or not folder.name
        )
        partial, old, lock = (
            folder / f".export{tag}{end}" if inside else folder.with_name(f"{folder.name}{tag}{end}")
            for end in (".partial", ".old", ".lock")
        )
        return cls(folder, partial, old, lock, inside)

    def content(self) -> list[Path]:
        """What the folder contains, without its own temporary files. Empty if the folder does not exist."""
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if path not in (self.partial, self.old, self.lock)]

    def check_replaceable(self, record: str, kind: str, option: str) -> None:
        """Raise UsageError if there is anything but `kind`, which has the file `record`, or an empty folder.

        `option` is the one that names the folder.
        """
        if not self.folder.exists() or (self.folder / record).is_file() or (self.folder.is_dir() and not self.content()):
            return
        raise UsageError(
            f"{self.folder} holds something that is not {kind}",
            found=f"no {record} in it" if self.folder.is_dir() else "a file",
            wanted=f"a path that does not exist, an empty folder, or {kind} to replace",
            fix=shlex.join([option, f"{self.folder}-2"]),
        )

    @contextlib.contextmanager
    def written(self, last: str) -> Iterator[Path]:
        """A new folder to write in. Its content replaces that of the folder at the end of the block, unless the block raises.

        The block writes the file `last` (see `put`). Hold `lock` meanwhile. Raises DependencyError if the disk refuses.
        """
        with disk_errors(self.folder):
            self.restore()
            shutil.rmtree(self.partial, ignore_errors=True)  # of a process that was killed
            try:
                self.partial.mkdir(parents=True)
                yield self.partial
                self.put(last)
            finally:
                shutil.rmtree(self.partial, ignore_errors=True)

    def restore(self) -> None:
        """Undo a `put` that was killed after it had moved the old content away."""
        if not self.inside and self.old.exists() and not self.folder.exists():
            self.old.rename(self.folder)

    def put(self, last: str) -> None:
        """Replace the folder's content by that of `partial`. The file `last`, which says that it is complete, comes last."""
        if not self.inside:
            if self.folder.exists():
                shutil.rmtree(self.old, ignore_errors=True)
                self.folder.rename(self.old)
            self.partial.rename(self.folder)
            shutil.rmtree(self.old, ignore_errors=True)
            return
        for path in sorted(self.content(), key=lambda path: path.name != last):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in sorted(self.partial.iterdir(), key=lambda path: path.name == last):
            path.rename(self.folder / path.name)
        self.partial.rmdir()


def _is_current(folder: Path) -> bool:
    try:
        return folder.samefile(Path.cwd())
    except OSError:  # the current folder was deleted
        return False
