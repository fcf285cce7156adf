"""Images on their way in and out: uploads, which nobody trusts, and image files in memory."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageChops

from sana_export.image_files import encode_file
from sana_export.serve.errors import Refusal

#: The formats of uploads, as Pillow names them.
UPLOADS = ("PNG", "JPEG", "WEBP")
#: Our word for each format of OpenAI's API, and its media type.
OUTPUTS: Mapping[str, tuple[str, str]] = {
    "png": ("png", "image/png"),
    "jpeg": ("jpg", "image/jpeg"),
    "webp": ("webp", "image/webp"),
}
_DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,", re.IGNORECASE)


def from_data_url(name: str, text: str) -> bytes:
    """The bytes in a data URL. Raises Refusal for every other URL, path or text: nothing is opened."""
    start = _DATA_URL.match(text)
    if start is None:
        message = f"{name} is not a file or a data URL (data:image/png;base64,...); other URLs are never opened"
        raise Refusal("invalid_image", message, param=name)
    try:
        return base64.b64decode(text[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal("invalid_image", f"the data URL in {name} is not base64", param=name) from error


def check_uploads(image: bytes | None, mask: bytes | None, most_pixels: int) -> None:
    """Check the kinds and the sizes of uploaded files by their first bytes. Nothing is decoded. Raises Refusal."""
    for name, content in (("image", image), ("mask", mask)):
        if content is not None:
            _opened(name, content, most_pixels)


def read_uploads(image: bytes | None, mask: bytes | None, most_pixels: int) -> dict[str, Any]:
    """The uploaded files that are given, decoded, as parameters of the runtime's `Request`. Raises Refusal as `read_upload`."""
    images = {} if image is None else {"image": read_upload("image", image, most_pixels)}
    return images if mask is None else {**images, "mask": read_mask("mask", mask, most_pixels)}


def read_upload(name: str, content: bytes, most_pixels: int) -> Image.Image:
    """The image in an uploaded file, decoded. Raises Refusal if it is none, is damaged, or has more than `most_pixels` pixels."""
    image = _opened(name, content, most_pixels)
    try:
        image.load()
    except Exception as error:  # any: whatever a decoder raises for a damaged file
        raise _not_an_image(name) from error
    return image


def _opened(name: str, content: bytes, most_pixels: int) -> Image.Image:
    """An uploaded file whose kind and size have been read from its first bytes. Raises Refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(io.BytesIO(content), formats=UPLOADS)
    except Image.DecompressionBombError as error:  # Pillow's own limit, which it knows by the same first bytes
        raise _too_large(name, "far too many pixels", most_pixels) from error
    except Exception as error:  # any: whatever a decoder raises for a file of another kind
        raise _not_an_image(name) from error
    if image.width * image.height > most_pixels:
        raise _too_large(name, f"{image.width}x{image.height} pixels", most_pixels)
    return image


def _not_an_image(name: str) -> Refusal:
    return Refusal("invalid_image", f"{name} is not a whole image file ({', '.join(UPLOADS)})", param=name)


def _too_large(name: str, found: str, most: int) -> Refusal:
    return Refusal("invalid_image", f"{name} is too large: {found}; at most {most} pixels are allowed", param=name)


def read_mask(name: str, content: bytes, most_pixels: int) -> Image.Image:
    """A mask as the runtime reads it: white where the image is drawn anew.

    With an alpha channel, transparent pixels are drawn anew, as in OpenAI's API; without one, white pixels.
    """
    mask = read_upload(name, content, most_pixels)
    if "A" in mask.getbands() or "transparency" in mask.info:
        return ImageChops.invert(mask.convert("RGBA").getchannel("A"))
    return mask


def encode_image(image: Image.Image, word: str, quality: int | None, metadata: Mapping[str, Any] | None = None) -> bytes:
    """An image file in memory, quickly. The parameters are those of `image_files.save_image`, `word` is one of its `FORMATS`."""
    buffer = io.BytesIO()
    encode_file(image, word, metadata, quality, buffer, fast=True)
    return buffer.getvalue()
