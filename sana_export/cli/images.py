"""Image files that `generate` writes: names, formats, and writing each file whole or not at all."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from sana_export.errors import UsageError
from sana_export.files import disk_errors, write_whole
from sana_export.user_paths import user_path

#: File suffix to Pillow's format. None: a numpy array of float32 values in [0, 1].
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".npy": None}
#: Arguments of Pillow's `save`.
SAVE_OPTIONS: dict[str | None, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}


def check_output(output: Path, count: int) -> str:
    """The runtime's output type for `count` images in the file `output`. Writes nothing.

    Raises UsageError if the suffix is not one of `FORMATS`, or a file's name is that of a folder or too long; DependencyError if
    the folder is not writable.
    """
    folder = output.is_dir()
    if output.suffix.lower() not in FORMATS or folder:
        raise UsageError(
            "the output is not the name of an image file",
            found=f"{output}, a folder" if folder else output,
            wanted="a name that ends with " + ", ".join(FORMATS),
            fix=shlex.join(["-o", str(output / "image.png" if folder or not output.suffix else output.with_suffix(".png"))]),
        )
    for path in output_paths(output, count):
        if user_path(path, "--output").is_dir():
            raise UsageError(
                f"{path} is a folder", wanted="the name of an image file", fix=shlex.join(["-o", str(path / "image.png")])
            )
    existing = next(folder for folder in output.parents if folder.exists() or folder == folder.parent)
    with disk_errors(output), tempfile.TemporaryFile(dir=existing, prefix=".sana-export."):
        pass
    return "np" if FORMATS[output.suffix.lower()] is None else "pil"


def output_paths(output: Path, count: int) -> list[Path]:
    """dir/x.png for one image; dir/x-0.png, dir/x-1.png, ... for several."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(count)]


def write_images(images: Sequence[Any] | npt.NDArray[Any], output: Path) -> list[Path]:
    """Write Pillow images, or arrays [H, W, 3] for .npy, and return their paths. Creates the folder."""
    paths = output_paths(output, len(images))
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    for path, image in zip(paths, images, strict=True):
        write_whole(path, partial(_save, image, FORMATS[path.suffix.lower()]))
    return paths


def _save(image: Any, format: str | None, file: BinaryIO) -> None:
    if format is None:
        import numpy

        numpy.save(file, image, allow_pickle=False)
    else:
        image.save(file, format=format, **SAVE_OPTIONS.get(format, {}))
