"""The folder of images of a prompts file: which ones are there, from which words, so that the next run draws only those missing.

`index.jsonl` has a first line with the seed of the folder and then a line for each image. An image's line is written before its
file gets its name, and the file is written whole. So whenever the process dies, a file that is there has its line, and is whole.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import Any, Self

from sana_export.errors import UsageError
from sana_export.files import disk_errors, locked, write_whole
from sana_export.image_files import FORMATS, encode_file

FILE_NAME = "index.jsonl"
LOCK_NAME = ".lock"
#: The temporary names of our files (`write_whole`).
_PARTIAL = re.compile(rf"\.(\d{{6,}}(-\d+)?\.[a-z]+|{re.escape(FILE_NAME)})\.\d+-\d+\.partial")
#: The version of the index.
FORMAT = 1


class State(Enum):
    """What a folder has of an image."""

    MISSING = "missing"
    DRAWN = "drawn"
    #: Its file was drawn from other words or settings.
    OTHER = "other"
    #: Its file is in no line of the index.
    FOREIGN = "foreign"
    #: Its file is another image of another size than was written.
    EDITED = "edited"


@dataclass(frozen=True)
class _Entry:
    key: str
    bytes: int


class DrawnImages:
    """The images of one folder, while no other process draws into it."""

    def __init__(self, folder: Path, word: str, seed: int | None) -> None:
        """`word`: the format of the files. `seed`: the seed of a new folder. None draws one."""
        self.folder, self._kind, self._word = folder, FORMATS[word], word
        self._entries: dict[str, _Entry] = {}
        known = self._load()
        self._remove_partial()
        #: The seed that the images without a seed of their own count from.
        self.seed: int = next(number for number in (seed, known, secrets.randbelow(2**32)) if number is not None)
        self._write_index()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, word: str, seed: int | None, on_wait: Any = lambda: None) -> Iterator[Self]:
        """The folder, made if it does not exist, with its lock. `on_wait` is called if another process has the lock."""
        with disk_errors(folder / FILE_NAME):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_NAME, on_wait, remove=True):
            yield cls(folder, word, seed)

    def path(self, stem: str) -> Path:
        """The file of an image."""
        return self.folder / f"{stem}{self._kind.suffixes[0]}"

    def state(self, stem: str, key: str) -> State:
        """What is here of the image `stem` that is drawn from what `key` stands for."""
        path = self.path(stem)
        entry = self._entries.get(path.name)
        if not path.exists():
            return State.MISSING
        if entry is None:
            return State.FOREIGN
        if entry.key != key:
            return State.OTHER
        if path.stat().st_size == entry.bytes:
            return State.DRAWN
        return State.EDITED if _is_whole(path) else State.MISSING

    def write(
        self, stem: str, key: str, line: int, image: Any, metadata: dict[str, Any], quality: int | None, *, carry: bool
    ) -> Path:
        """Write an image, with its metadata if `carry`. Raises DependencyError if the disk refuses."""
        path, content = self.path(stem), BytesIO()
        encode_file(image, self._word, metadata if carry else None, quality, content)
        size = content.getbuffer().nbytes
        entry = {"file": path.name, "line": line, "key": key, "bytes": size, "seed": metadata["request"]["seed"]}
        with disk_errors(self.folder / FILE_NAME), (self.folder / FILE_NAME).open("ab") as index:
            index.write(json.dumps(entry).encode() + b"\n")
        self._entries[path.name] = _Entry(key, size)
        write_whole(path, content.getvalue())
        return path

    def _load(self) -> int | None:
        """Read the index, if there is one, and return its seed. A last line that was cut off is dropped."""
        path = self.folder / FILE_NAME
        if not path.exists():
            return None
        seed = None
        with disk_errors(path), path.open("rb") as index:
            for number, line in enumerate(index):
                try:
                    document = json.loads(line)
                    if number == 0:
                        if document["format"] != FORMAT:
                            raise ValueError
                        seed = int(document["seed"])
                        continue
                    self._entries[str(document["file"])] = _Entry(str(document["key"]), int(document["bytes"]))
                except (KeyError, TypeError, ValueError, RecursionError) as error:
                    if number == 0:
                        raise UsageError(
                            f"{path} is not the index of such a folder",
                            found="another file of that name",
                            wanted="an empty folder, or one that generate --prompts-file made",
                        ) from error
        return seed

    def _remove_partial(self) -> None:
        """Delete what a process that was killed left of our files."""
        with disk_errors(self.folder / FILE_NAME):
            for left in self.folder.glob(".*.partial"):
                if _PARTIAL.fullmatch(left.name) and left.is_file():
                    left.unlink(missing_ok=True)

    def _write_index(self) -> None:
        """Make the index end with a whole line, with the folder's seed on the first one."""
        path = self.folder / FILE_NAME
        if not path.exists() or path.stat().st_size == 0:
            write_whole(path, json.dumps({"format": FORMAT, "seed": self.seed}) + "\n")
            return
        with disk_errors(path), path.open("rb+") as index:
            end = index.seek(0, 2)
            if end and (index.seek(end - 1), index.read(1))[1] != b"\n":
                index.write(b"\n")  # after a line that was cut off, which is not JSON


def _is_whole(path: Path) -> bool:
    """Whether a file is an image that can be decoded, or an array."""
    try:
        if path.suffix == ".npy":
            import numpy

            numpy.load(path, allow_pickle=False)
        else:
            from PIL import Image

            with Image.open(path) as image:
                image.load()
    except Exception:  # any: a damaged file makes Pillow and numpy raise what they like
        return False
    return True
