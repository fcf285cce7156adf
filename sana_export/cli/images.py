"""Where `generate` writes: names, formats, and files that appear only when they are whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from sana_export.errors import UsageError
from sana_export.files import disk_errors

#: Suffix of a file: the format that Pillow writes, or None for float32 values in [0, 1] as a numpy array.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".npy": None}
#: Arguments of Pillow's `save`.
SAVE_OPTIONS: dict[str | None, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}


def check_output(output: Path) -> str:
    """The runtime's output type for `output`, once its name makes sense and its folder takes files. The folder is made.

    Raises UsageError for a name without a known suffix, DependencyError for a folder that cannot be written.
    """
    if output.suffix.lower() not in FORMATS or output.is_dir():
        raise UsageError(
            "the output is not the name of an image file",
            found=str(output),
            wanted="a name that ends with " + ", ".join(FORMATS),
            fix=f"-o {output / 'image.png' if not output.suffix else output.with_suffix('.png')}",
        )
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent, prefix=".sana-export."):
            pass
    return "np" if FORMATS[output.suffix.lower()] is None else "pil"


def output_paths(output: Path, count: int) -> list[Path]:
    """dir/x.png for one image; dir/x-0.png, dir/x-1.png, ... for several."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(count)]


def write_images(images: Sequence[Any] | npt.NDArray[Any], output: Path) -> list[Path]:
    """Write Pillow images, or arrays [H, W, 3] for .npy, each under a temporary name that is then changed."""
    paths = output_paths(output, len(images))
    for path, image in zip(paths, images, strict=True):
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with disk_errors(path):
            try:
                with partial.open("wb") as file:
                    _save(image, file, FORMATS[path.suffix.lower()])
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return paths


def _save(image: Any, file: BinaryIO, format: str | None) -> None:
    if format is None:
        import numpy

        numpy.save(file, image, allow_pickle=False)
    else:
        image.save(file, format=format, **SAVE_OPTIONS.get(format, {}))
