"""Images that a user gives: read, checked and prepared for the encoder, in Pillow and numpy.

Files and Pillow images are read as diffusers' `load_image` reads them: rotated as their EXIF data says, then converted to RGB.
Sizes and values are prepared as diffusers' `VaeImageProcessor.preprocess` does, which all of its image-to-image pipelines use: the
image is resized to the sampled size by Pillow's Lanczos filter, without keeping its shape.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sana_export.errors import UsageError
from sana_export.formats.arrays import Array, Float32
from sana_export.numeric import MAX_IMAGES, shown
from sana_export.user_paths import user_path

LOG = logging.getLogger(__name__)

#: The most pixels of an image: 400 MB as RGB. A file of a few MB can claim any number, so it is checked before it is decoded.
MAX_SOURCE_PIXELS = 2**27
#: The file formats that are read, as Pillow names them. It knows others that start programs to decode them (EPS).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
#: Pillow's modes whose values are not 0 to 255 or 0 to 65535.
_UNKNOWN_RANGE = ("I", "F")
_WANTED = "a file name, a Pillow image, or a numpy array [height, width, 3] of uint8, or of floats in [0, 1]"

#: An image of a request: RGB, or float32 [H, W, 3] (a mask: [H, W, 1]) in [0, 1].
GivenImage = Image.Image | Float32


def given_images(name: str, value: Any, *, mask: bool = False) -> tuple[GivenImage, ...]:
    """The images in the parameter `name`: one, or a list of them. Files are opened and decoded.

    `mask`: arrays of one channel are allowed. Raises UsageError for what is not an image, is damaged or is too large.
    """
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = list(value)
    if not isinstance(value, list | tuple):
        return (_given_image(name, value, mask),)
    if not 1 <= len(value) <= MAX_IMAGES:
        raise UsageError(f"{name} is a list of the wrong length", found=f"{len(value)} images", wanted=f"1 to {MAX_IMAGES}")
    return tuple(_given_image(f"{name}[{index}]", item, mask) for index, item in enumerate(value))


def prepared_image(image: GivenImage, height: int, width: int) -> Float32:
    """The image as the encoder reads it: float32 [1, 3, height, width] in [-1, 1]."""
    values: Float32 = np.float32(2.0) * _resized(image, height, width) - np.float32(1.0)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[np.newaxis])


def prepared_mask(mask: GivenImage, height: int, width: int, factor: int) -> Float32:
    """The mask for latents of an image of `height` x `width`: float32 [1, 1, h, w], 1 where the image is drawn anew.

    It is resized to the image, made gray and then black or white (values of 0.5 and more are white). Of every `factor` x `factor`
    pixels, which are one latent pixel, the first one counts, as in diffusers.
    """
    gray = _resized(mask, height, width, gray=True)
    return np.ascontiguousarray((gray >= np.float32(0.5)).astype(np.float32)[np.newaxis, np.newaxis, ::factor, ::factor, 0])


def encoder_graphs(tile: int) -> tuple[str, ...]:
    """The graphs that encode images in tiles of the side `tile`, or in one piece (0)."""
    return ("vae_encoder_head", "vae_encoder_tail") if tile else ("vae_encoder",)


def warn_about_shape(image: GivenImage, height: int, width: int) -> None:
    """Log a warning if an image of `height` x `width` is a stretched `image`."""
    own_width, own_height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    if not 0.97 < (own_width / own_height) / (width / height) < 1.03:
        longest = max(height, width)
        scale = longest / max(own_height, own_width)
        LOG.warning(
            "the image of %dx%d (height x width) is stretched to %dx%d, as in diffusers; for its own shape: --height %d --width %d",
            *(own_height, own_width, height, width, max(round(own_height * scale), 1), max(round(own_width * scale), 1)),
        )


def _given_image(name: str, value: Any, mask: bool) -> GivenImage:
    if isinstance(value, np.ndarray):
        return _from_array(name, value, mask)
    if isinstance(value, Image.Image):
        return _decoded(name, value)
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name} is not an image", found=shown(value), wanted=_WANTED)
    path = check_image_file(name, value)
    with _opened(path) as image:
        return _decoded(str(path), image)


def check_image_file(name: str, value: str | os.PathLike[str]) -> Path:
    """The path of the image file in the parameter `name`. Raises UsageError if there is no such file. It is not read."""
    path = user_path(value, f"the image file of {name}")
    if not os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises an error for a folder that may not be read
        found = "a folder" if os.path.isdir(path) else "no such file, or one that may not be read"  # noqa: PTH112
        raise UsageError(f"there is no image {path}", found=found, wanted="the path of an image file")
    return path


def _opened(path: Path) -> Image.Image:
    """The image in the file `path`, not decoded yet."""
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_decoded` has a limit of its own
            return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise _too_large(str(path), str(error)) from error
    except Exception as error:  # any: whatever a decoder raises for a file of another kind
        found = "a file of another kind" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} is not an image", found=found, wanted=", ".join(FORMATS)) from error


def _decoded(name: str, image: Image.Image) -> Image.Image:
    """A copy of the image in RGB. `name` is what errors call it."""
    if image.width * image.height > MAX_SOURCE_PIXELS:
        raise _too_large(name, f"{image.height}x{image.width} (height x width)")
    if image.mode in _UNKNOWN_RANGE:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise UsageError(f"{name} has {kind} pixels", found=f"mode {image.mode}", wanted="8 or 16 bits for each color")
    try:
        if getattr(image, "is_animated", False) and image.format != "MPO":
            LOG.warning("%s has several frames: the first one is used", name)
        image = ImageOps.exif_transpose(image)  # decodes
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit gray at 255. It keeps the high byte of 16-bit colors, and this does the same.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # any: as above
        found = f"{type(error).__name__}: {error}"
        raise UsageError(f"{name} is damaged", found=found, wanted="a whole image file") from error


def _too_large(name: str, found: str) -> UsageError:
    return UsageError(
        f"{name} is too large", found=found, wanted=f"at most {MAX_SOURCE_PIXELS} pixels", fix="make it smaller first"
    )


def _from_array(name: str, array: Array, mask: bool) -> GivenImage:
    """An array as an image: of uint8 like a Pillow image, of floats like diffusers' numpy images."""
    if mask and array.ndim == 2:
        array = array[..., np.newaxis]
    channels = (3,) if not mask else (1, 3) if array.dtype == np.uint8 else (1,)
    if array.ndim != 3 or array.shape[-1] not in channels or 0 in array.shape:
        raise UsageError(f"{name} is not an image", found=f"an array of shape {list(array.shape)}", wanted=_WANTED)
    if array.shape[0] * array.shape[1] > MAX_SOURCE_PIXELS:
        raise _too_large(name, f"{array.shape[0]}x{array.shape[1]} (height x width)")
    if array.dtype == np.bool_:
        array = array.astype(np.float32)
    if array.dtype == np.uint8:
        return Image.fromarray(array if array.shape[-1] == 3 else array[..., 0]).convert("RGB")
    if not np.issubdtype(array.dtype, np.floating):
        raise UsageError(f"{name} has the wrong dtype", found=str(array.dtype), wanted="uint8, or floats in [0, 1]")
    least, most = float(array.min()), float(array.max())
    if not (least >= 0 and most <= 1):  # NaN too
        raise UsageError(f"{name} has values out of range", found=f"{least:g} to {most:g}", wanted="floats in [0, 1]")
    return array.astype(np.float32)


def _resized(image: GivenImage, height: int, width: int, *, gray: bool = False) -> Float32:
    """The image as float32 [height, width, channels] in [0, 1]."""
    if isinstance(image, Image.Image):
        resized = image.resize((width, height), resample=Image.Resampling.LANCZOS)
        resized = resized.convert("L") if gray else resized
        values = np.asarray(resized).astype(np.float32) / np.float32(255.0)
        return values[..., np.newaxis] if gray else values
    return image[_nearest(image.shape[0], height)][:, _nearest(image.shape[1], width)]


def _nearest(size: int, resized: int) -> Array:
    """For each pixel of a side of `resized` pixels, the pixel that torch's `interpolate` (nearest) takes from one of `size`."""
    scale = np.float32(size) / np.float32(resized)
    index: Array = np.minimum(np.floor(np.arange(resized, dtype=np.float32) * scale).astype(np.int64), size - 1)
    return index


def image_for_each(name: str, given: int, prompts: int, per_prompt: int) -> tuple[int, ...]:
    """The number of the given image that each of the `prompts` * `per_prompt` drawn images starts from.

    Raises UsageError unless there is one image for all, one for each prompt or one for each drawn image.
    """
    total = prompts * per_prompt
    if given == 1:
        return (0,) * total
    if given == prompts:
        return tuple(index // per_prompt for index in range(total))
    if given == total:
        return tuple(range(total))
    each = "" if per_prompt == 1 else f", or {total}, one for each image"
    raise UsageError(
        f"the number of images in {name} does not match the number of prompts",
        found=f"{given} images for {prompts} prompts with {per_prompt} images each",
        wanted=f"1 for all, or {prompts}, one for each prompt{each}",
    )


def distinct(sources: Sequence[int]) -> tuple[int, ...]:
    """The numbers in `sources`, each once, in order."""
    return tuple(sorted(set(sources)))
