"""A folder that is written whole or not at all, and that replaces only what was written in the same way."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from sana_export.errors import UsageError
from sana_export.files import disk_errors, locked
from sana_export.output_folder import OutputFolder
from sana_export.user_paths import user_path


@contextlib.contextmanager
def written_folder(folder: Path, last: str, option: str) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` at the end of the block, unless the block raises.

    The block writes the file `last`; a folder that has it is replaced. Raises UsageError, which names the option, if `folder` has
    something else in it.
    """
    folder = user_path(folder, option)
    place = OutputFolder.of(folder)
    check_replaceable(folder, last, option)
    with disk_errors(folder):
        place.partial.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.lock, remove=True):
            shutil.rmtree(place.partial, ignore_errors=True)
            place.partial.mkdir(parents=True)
            try:
                yield place.partial
                place.put(last)
            finally:
                shutil.rmtree(place.partial, ignore_errors=True)


def check_replaceable(folder: Path, last: str, option: str) -> None:
    """Raise UsageError if `folder` is a file, or has something in it but not the file `last`."""
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / last).is_file()):
        return
    if folder.exists() or folder.is_symlink():
        raise UsageError(
            f"{folder} would be overwritten",
            found="a folder with other files" if folder.is_dir() else "a file",
            wanted=f"a new folder, or one that {option} wrote before",
            fix=f"{option} {folder.with_name(folder.name + '-2')}",
        )
