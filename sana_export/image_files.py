"""Image files: formats, what they carry about how they were drawn, and writing each file whole or not at all.

The parameters of an image are in its file twice: as the text that other programs show ("parameters" of a PNG file, the EXIF tag
UserComment of JPEG and WebP), and as a JSON document from which `generate --from-image` draws it again.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sana_export import __version__
from sana_export.errors import UsageError
from sana_export.files import disk_errors, write_whole
from sana_export.numeric import integer
from sana_export.user_paths import user_path

if TYPE_CHECKING:
    from PIL import Image

LOG = logging.getLogger(__name__)

#: The key of the JSON document in a PNG file, and what it begins with in EXIF.
KEY = "sana_export"
#: The key of the readable text in a PNG file, as AUTOMATIC1111's web UI and the viewers of its images know it.
TEXT_KEY = "parameters"
#: A JPEG file has room for one EXIF block of this size. Pillow raises an error beyond it.
MOST_EXIF_BYTES = 65_000
#: The longest JSON document that is read: a prompt of the longest, each character escaped, and some more.
MOST_JSON = 4 << 20
_USER_COMMENT, _IMAGE_DESCRIPTION, _SOFTWARE, _EXIF_IFD = 0x9286, 0x010E, 0x0131, 0x8769
_UNICODE = b"UNICODE\0"
#: What `read_metadata` opens, as Pillow names it. It knows formats whose readers start programs.
_READ = ("PNG", "JPEG", "WEBP")
_OURS = "a .png, .jpg or .webp file that sana-export wrote"


@dataclass(frozen=True)
class ImageFormat:
    """A kind of image file."""

    #: Suffixes of its files, in lower case; the first one is used for new files.
    suffixes: tuple[str, ...]
    #: Pillow's name of it. None: a numpy array of float32 values in [0, 1].
    pillow: str | None
    #: Arguments of Pillow's `save`.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Whether it has a quality; the image is then no longer stored exactly.
    has_quality: bool = False


#: By the word of `--output-format`.
FORMATS = {
    "png": ImageFormat((".png",), "PNG"),
    "jpg": ImageFormat((".jpg", ".jpeg"), "JPEG", {"quality": 95}, has_quality=True),
    "webp": ImageFormat((".webp",), "WEBP", {"lossless": True}, has_quality=True),
    "npy": ImageFormat((".npy",), None),
}
#: The word by suffix.
SUFFIXES = {suffix: word for word, kind in FORMATS.items() for suffix in kind.suffixes}


def check_quality(word: str, quality: int | None) -> None:
    """Raise UsageError if the format `word` has no quality and one is given, or if it is out of range."""
    if quality is None:
        return
    integer("quality", quality, 1, 100)
    if not FORMATS[word].has_quality:
        raise UsageError(
            f"the format {word} has no quality",
            found=f"quality {quality}",
            wanted="jpg or webp, or no quality",
            fix="--output-format webp",
        )


def save_image(
    image: Any, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None, *, quality: int | None = None
) -> None:
    """Write an image to a file, whole or not at all.

    image: a Pillow image; for `.npy`, an array [height, width, 3].
    path: its suffix chooses the format, `.png`, `.jpg`, `.jpeg`, `.webp` or `.npy`.
    metadata: how it was drawn, an item of `SanaResult.metadata`. None writes none. A `.npy` file has none.
    quality: of `.jpg` (95) and `.webp` (lossless) files, 1 to 100.

    Raises UsageError for another suffix or quality and DependencyError if the disk refuses.
    """
    target = user_path(path, "the image file")
    word = SUFFIXES.get(target.suffix.lower())
    if word is None:
        raise UsageError(
            "the output is not the name of an image file", found=target, wanted="a name that ends with " + ", ".join(SUFFIXES)
        )
    check_quality(word, quality)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, partial(encode_file, image, word, metadata, quality))


def encode_file(
    image: Any, word: str, metadata: Mapping[str, Any] | None, quality: int | None, file: BinaryIO, *, fast: bool = False
) -> None:
    """Write an image in the format `word` to an open file. The parameters are those of `save_image`.

    fast: compress PNG files less, in a third of the time or less. They are larger by a fifth to two fifths.
    """
    kind = FORMATS[word]
    if kind.pillow is None:
        import numpy

        numpy.save(file, image, allow_pickle=False)
        return
    options = dict(kind.options)
    if fast and kind.pillow == "PNG":
        options["compress_level"] = 1
    if quality is not None:
        options = {**options, "lossless": False, "quality": quality} if "lossless" in options else {**options, "quality": quality}
    if metadata is not None:
        options |= _png_text(metadata) if kind.pillow == "PNG" else _exif(metadata, kind.pillow)
    image.save(file, format=kind.pillow, **options)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How the image in a file was drawn: the document that `save_image` wrote.

    Raises UsageError if there is no such image, or if nothing or something else than such a document is in it.
    """
    file = user_path(path, "the image file")
    text, other = _texts_of(file)
    if text is None:
        raise UsageError(
            f"{file} does not say how it was drawn",
            found=f"the parameters of another program: {other}" if other else "no parameters",
            wanted="an image that sana-export wrote, without --no-metadata, and that no other program saved again",
        )
    try:
        document = json.loads(text) if len(text) <= MOST_JSON else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UsageError(
            f"the parameters in {file} are damaged", found="a text that is not a JSON object", wanted="the image as it was written"
        )
    return document


def _png_text(metadata: Mapping[str, Any]) -> dict[str, Any]:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(TEXT_KEY, readable(metadata))  # as Latin-1 if it can be, as UTF-8 if not
    info.add_text(KEY, json.dumps(metadata))
    return {"pnginfo": info}


def _exif(metadata: Mapping[str, Any], pillow: str) -> dict[str, Any]:
    from PIL import Image

    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = f"{KEY}: {json.dumps(metadata)}"
    exif[_SOFTWARE] = f"sana-export {__version__}"
    exif[_EXIF_IFD] = {_USER_COMMENT: _UNICODE + readable(metadata).encode("utf-16-be", "replace")}
    content = exif.tobytes()
    if pillow == "JPEG" and len(content) > MOST_EXIF_BYTES:
        LOG.warning("the prompt is too long for the metadata of a JPEG file, so the image is written without: use png or webp")
        return {}
    return {"exif": content}


def _texts_of(path: Path) -> tuple[str | None, str | None]:
    """Our own document in the image at `path`, and the readable text. Nothing is decoded."""
    from PIL import Image

    if not os.path.isfile(path) and os.path.exists(path):  # noqa: PTH110, PTH113  # a pipe would be waited for without end
        found = "a folder" if os.path.isdir(path) else "not a regular file"  # noqa: PTH112
        raise UsageError(f"{path} is not an image", found=found, wanted=_OURS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            opened = Image.open(path, formats=_READ)
        with opened as image:
            if image.format == "PNG":
                return image.info.get(KEY), image.info.get(TEXT_KEY)
            return _exif_texts(image)
    except FileNotFoundError as error:
        raise UsageError(f"there is no image {path}", wanted="an image that sana-export wrote") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
        raise UsageError(f"{path} is not an image", found=str(error), wanted=_OURS) from error


def _exif_texts(image: Image.Image) -> tuple[str | None, str | None]:
    exif = image.getexif()
    description, comment = exif.get(_IMAGE_DESCRIPTION), exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    own = description.removeprefix(f"{KEY}: ") if isinstance(description, str) and description.startswith(f"{KEY}: ") else None
    other = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace") if isinstance(comment, bytes) else None
    return own, other


def readable(metadata: Mapping[str, Any]) -> str:
    """The parameters as AUTOMATIC1111's web UI writes them: the prompt, the negative prompt, and a line of settings."""
    request, model = metadata["request"], metadata["model"]
    settings = {
        "Steps": metadata.get("steps"),
        "Sampler": metadata.get("sampler"),
        "CFG scale": request.get("guidance_scale"),
        "Seed": request.get("seed"),
        "Size": f"{request['width']}x{request['height']}" if {"width", "height"} <= request.keys() else None,
        "Model hash": model["sha256"][:10],
        "Model": model["name"],
        **{name.replace("_", " "): value for name, value in request.items() if name not in _SHOWN},
        "Lora hashes": ", ".join(f"{lora['name']}: {lora['sha256'][:12]}" for lora in metadata["loras"]) or None,
        "Version": f"sana-export {metadata['sana_export']}",
    }
    lines = [str(request.get("prompt", ""))]
    if request.get("negative_prompt"):
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


#: The words of a request that have a place of their own in the readable text.
_SHOWN = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "height", "width")


def _quoted(value: Any) -> str:
    """A value in the line of settings, in quotes if it could be taken for the next setting."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
