"""Files with prompts: text with one prompt a line, or JSON lines with the words of a request.

A file is read line by line, so its size does not matter, and a line that cannot be drawn does not concern the others.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sana_export.errors import UsageError
from sana_export.files import hash_file
from sana_export.numeric import MAX_IMAGES, as_integer, integer, shown
from sana_export.runtime.images import check_image_file
from sana_export.runtime.inputs import MAX_CHARACTERS
from sana_export.runtime.request import Request
from sana_export.runtime.words import CALL_WORDS, check_words

#: Longest line in bytes: a prompt and a negative prompt of the longest, every character escaped in JSON.
MOST_LINE_BYTES = 2 * 12 * MAX_CHARACTERS + 10_000
#: Words of a request that no line of text can have, or that the options of the command decide.
_NOT_IN_A_LINE = (
    "output_type",
    "latents",
    *(f"{name}prompt_{part}" for name in ("", "negative_") for part in ("embeds", "attention_mask")),
)
#: The words of a line.
WORDS = tuple(item.name for item in fields(Request) if item.name not in _NOT_IN_A_LINE)
#: Those that name an image file.
IMAGES = ("image", "mask", "control_image")
#: Words that have a meaning only with the image that another one names.
_NEEDS = {"strength": "image", "mask": "image", "controlnet_conditioning_scale": "control_image"}
_DEFAULTS = {item.name: item.default for item in fields(Request)}
#: Between the seeds of two images of one line, so that they do not meet those of other lines.
SEED_STRIDE = 1_000_000
#: Seeds are these many different numbers.
_SEEDS = 2**64


@dataclass(frozen=True)
class Item:
    """One image of a line."""

    #: The number of the line, from 1.
    line: int
    #: Name of the image file without its suffix.
    stem: str
    #: The words of its request, with its seed.
    words: Mapping[str, Any]

    def key(self, settings: Mapping[str, Any]) -> str:
        """A hash of the words and of `settings`, which say what else decides the file's content."""
        files = {name: file_hash(str(value)) for name in IMAGES if isinstance(value := self.words.get(name), str)}
        text = json.dumps([dict(self.words), dict(settings), *([files] if files else [])], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be drawn."""

    #: The number of the line, from 1.
    line: int
    error: UsageError


def check_file(path: Path) -> None:
    """Raise UsageError unless `path` is a file of one of `KINDS`."""
    if not path.is_file():
        found = (
            "no such file"
            if not path.exists()
            else "a folder"
            if path.is_dir()
            else "not a regular file, which could not be read twice"
        )
        raise UsageError(f"{path} is not a file with prompts", found=found, wanted=_WANTED)
    if path.suffix.lower() not in KINDS:
        raise UsageError(
            f"{path} has no suffix that says how its lines are written",
            found=path.suffix or "no suffix",
            wanted=_WANTED,
            fix=shlex.join(["mv", str(path), str(path.with_suffix(".txt"))]),
        )


def check_values(words: Mapping[str, Any], *, alone: bool = True) -> None:
    """Raise UsageError for wrong words of a request. Image files have to be there, and are read only when they are drawn.

    `alone`: what has no meaning without an image is wrong without one.
    """
    needed = set() if alone else {_NEEDS[name] for name in words.keys() & _NEEDS}
    for name in IMAGES:
        if isinstance(value := words.get(name), str):
            check_image_file(name, value)
        elif value is not None:
            raise UsageError(f"{name} is not the name of a file", found=shown(value), wanted="the path of an image file")
    named = {name for name in IMAGES if words.get(name) is not None} | needed
    Request(**{**words, **{name: Image.new("RGB", (1, 1)) for name in named}})


def file_hash(path: str) -> str | None:
    """The SHA-256 of a file, computed again only if it changed. None if there is none."""
    try:
        found = Path(path).stat()
        return _hash_of(path, found.st_mtime_ns, found.st_size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _hash_of(path: str, changed: int, size: int) -> str:
    return hash_file(Path(path))


def read_items(path: Path, defaults: Mapping[str, Any], seed: int) -> Iterator[Item | BadLine]:
    """The images of the lines of a file. Empty lines have none.

    defaults: words of a request for lines that do not have them.
    seed: an image without a seed of its own has `seed` + its line's number - 1, and the further images of a line each
    `SEED_STRIDE` more.
    """
    parse = KINDS[path.suffix.lower()]
    for number, line in _lines(path):
        try:
            if line is None:
                raise UsageError("the line is too long", found=f"more than {MOST_LINE_BYTES} bytes", wanted="one prompt a line")
            text = _decoded(line)
            if text.strip():
                yield from _items(number, {**defaults, **parse(text)}, seed)
        except UsageError as error:
            yield BadLine(number, error)


def _items(number: int, words: dict[str, Any], seed: int) -> list[Item]:
    """The images of one line, checked."""
    count = integer("num_images_per_prompt", words.pop("num_images_per_prompt", 1), 1, MAX_IMAGES)
    given = words.pop("seed", None)
    items = []
    for index in range(count):
        own = given[index] if isinstance(given, list) and len(given) == count else given
        if isinstance(given, list) and len(given) != count:
            raise UsageError(
                "the number of seeds does not match the number of images", found=f"{len(given)} seeds", wanted=f"{count}"
            )
        if own is None:
            own = (seed + number - 1 + index * SEED_STRIDE) % _SEEDS
        elif not isinstance(given, list) and index and (first := as_integer(own)) is not None:
            own = (first + index * SEED_STRIDE) % _SEEDS
        item = {**words, "seed": own}
        if not isinstance(item.get("prompt"), str):
            raise UsageError("prompt is not text", found=shown(item.get("prompt")), wanted="one prompt a line")
        if isinstance(item.get("negative_prompt"), list):
            raise UsageError("negative_prompt is not text", found=shown(item["negative_prompt"]), wanted="one text")
        check_values(item)
        items.append(Item(number, f"{number:06d}" if count == 1 else f"{number:06d}-{index}", item))
    return items


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines by number, without their ends. None for one that is too long."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            too_long = len(line) > MOST_LINE_BYTES
            while too_long and not line.endswith(b"\n") and (line := file.readline(MOST_LINE_BYTES)):
                pass
            yield number, None if too_long else line.rstrip(b"\r\n")


def _decoded(line: bytes) -> str:
    try:
        return line.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            "the line is not UTF-8 text", found=shown(line[max(0, error.start - 20) :][:40]), wanted="text in UTF-8"
        ) from error


def _prompt(text: str) -> dict[str, Any]:
    return {"prompt": text.strip()}


def _json_words(text: str) -> dict[str, Any]:
    try:
        words = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            "the line is not JSON", found=str(error), wanted='an object such as {"prompt": "a red apple", "seed": 7}'
        ) from error
    if not isinstance(words, dict):
        raise UsageError("the line is not a JSON object", found=shown(words), wanted='an object such as {"prompt": "a red apple"}')
    if unknown := {name: value for name, value in words.items() if name not in WORDS}:
        if others := sorted(unknown.keys() & _NOT_IN_A_LINE):
            raise UsageError(f"a line cannot have {others[0]}", found=", ".join(others), wanted=", ".join(WORDS))
        check_words("a line", unknown, CALL_WORDS, WORDS)
    return {name: value for name, value in words.items() if name in WORDS and (value is not None or _DEFAULTS[name] is not None)}


#: How a line is read, by the file's suffix.
KINDS: Mapping[str, Callable[[str], dict[str, Any]]] = {".txt": _prompt, ".jsonl": _json_words, ".ndjson": _json_words}
_WANTED = "a .txt file with one prompt a line, or a .jsonl file with one JSON object a line"
