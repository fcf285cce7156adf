"""Image files that `generate` writes: their names, and what is checked before anything is computed."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sana_export.errors import UsageError
from sana_export.files import disk_errors
from sana_export.image_files import FORMATS, SUFFIXES, check_quality, save_image
from sana_export.user_paths import user_path


def named_output(output: Path, word: str | None, quality: int | None = None) -> Path:
    """The image file of `-o`, with the suffix of `--output-format` if it has none. Raises UsageError for two formats."""
    if word is not None and not output.suffix and not output.is_dir():
        output = output.with_name(output.name + FORMATS[word].suffixes[0])
    found = SUFFIXES.get(output.suffix.lower())
    if word is not None and found not in (None, word):
        raise UsageError(
            "-o and --output-format name different formats",
            found=f"{output.name} and {word}",
            wanted="one format",
            fix=shlex.join(["-o", str(output.with_suffix(FORMATS[word].suffixes[0]))]),
        )
    if found is not None:
        check_quality(found, quality)
    return output


def check_output(output: Path, count: int) -> str:
    """The runtime's output type for `count` images in the file `output`. Writes nothing.

    Raises UsageError if the suffix is not one of `SUFFIXES`, or a file's name is that of a folder or too long; DependencyError if
    the folder is not writable.
    """
    folder = output.is_dir()
    if output.suffix.lower() not in SUFFIXES or folder:
        raise UsageError(
            "the output is not the name of an image file",
            found=f"{output}, a folder" if folder else output,
            wanted="a name that ends with " + ", ".join(SUFFIXES),
            fix=shlex.join(["-o", str(output / "image.png" if folder or not output.suffix else output.with_suffix(".png"))]),
        )
    for path in output_paths(output, count):
        if user_path(path, "--output").is_dir():
            raise UsageError(
                f"{path} is a folder", wanted="the name of an image file", fix=shlex.join(["-o", str(path / "image.png")])
            )
    check_writable(output.parent, output)
    return output_type(SUFFIXES[output.suffix.lower()])


def check_writable(folder: Path, output: Path) -> None:
    """Raise DependencyError, naming `output`, if files cannot be written to `folder`, which may not exist yet."""
    existing = next(place for place in (folder, *folder.parents) if place.exists() or place == place.parent)
    with disk_errors(output), tempfile.TemporaryFile(dir=existing, prefix=".sana-export."):
        pass


def output_type(word: str) -> str:
    """The runtime's output type for files of the format `word`."""
    return "np" if FORMATS[word].pillow is None else "pil"


def output_paths(output: Path, count: int) -> list[Path]:
    """dir/x.png for one image; dir/x-0.png, dir/x-1.png, ... for several."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(count)]


def write_images(
    images: Sequence[Any] | npt.NDArray[Any],
    output: Path,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    quality: int | None = None,
) -> list[Path]:
    """Write Pillow images, or arrays [H, W, 3] for .npy, with the metadata of each. Creates the folder. Returns the paths."""
    paths = output_paths(output, len(images))
    for index, path in enumerate(paths):
        save_image(images[index], path, None if metadata is None else metadata[index], quality=quality)
    return paths
