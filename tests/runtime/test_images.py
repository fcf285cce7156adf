"""Images that a user gives: prepared as diffusers prepares them, or refused with the reason."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.utils import load_image
from PIL import Image
from PIL import __version__ as pillow_version

from sana_export.errors import UsageError
from sana_export.runtime import images
from sana_export.runtime.images import given_images, image_for_each, prepared_image, prepared_mask
from tests.support.img2img import mask_latents

SIZES = [(96, 160), (64, 64), (256, 32), (150, 110)]
ORIENTATION = 274


def noise(mode: str = "RGB", width: int = 110, height: int = 150) -> Image.Image:
    rng = np.random.default_rng(0)
    bands = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return bands if mode == "RGBA" else bands.convert("RGB").convert(mode)


def reference(image: Any, height: int, width: int) -> np.ndarray:
    processor = PixArtImageProcessor(vae_scale_factor=1)
    return np.asarray(processor.preprocess(image, height=height, width=width))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_pillow_image_is_resized_as_in_diffusers(height: int, width: int) -> None:
    (image,) = given_images("image", noise())
    found = prepared_image(image, height, width)
    assert (found.dtype, found.shape) == (np.float32, (1, 3, height, width))
    np.testing.assert_array_equal(found, reference(noise(), height, width))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_of_floats_is_resized_as_in_diffusers(height: int, width: int, dtype: Any) -> None:
    array = np.random.default_rng(0).random((150, 110, 3)).astype(dtype)
    (image,) = given_images("image", array)
    np.testing.assert_array_equal(prepared_image(image, height, width), reference(array.astype(np.float32), height, width))


def test_an_array_of_bytes_is_a_pillow_image() -> None:
    array = np.asarray(noise())
    for value in (array, array[np.newaxis], [array]):
        (image,) = given_images("image", value)
        np.testing.assert_array_equal(prepared_image(image, 96, 64), reference(noise(), 96, 64))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_every_mode_is_read_as_load_image_does(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tiff" if mode in ("CMYK", "YCbCr") else "x.png")
    noise(mode).save(path)
    if mode == "YCbCr" and int(pillow_version.split(".")[0]) < 13:
        pytest.skip("Pillow 12 cannot read the TIFF files of this mode that it writes")
    for given in (path, str(path), noise(mode)):
        (image,) = given_images("image", given)
        np.testing.assert_array_equal(prepared_image(image, 64, 96), reference(load_image(str(path)), 64, 96))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    image = noise(width=40, height=90)
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    (found,) = given_images("image", tmp_path / "x.png")
    wanted = load_image(str(tmp_path / "x.png"))
    assert isinstance(found, Image.Image)
    assert found.size == wanted.size == ((90, 40) if orientation > 4 else (40, 90))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_sixteen_bits_of_gray_keep_their_brightness(name: str, tmp_path: Path) -> None:
    """Pillow's own conversion, which load_image uses, clips them at 255 of 65535, so the image gets white."""
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    (image,) = given_images("image", tmp_path / name)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], values >> 8)
    assert np.asarray(load_image(str(tmp_path / name))).mean() > 250


def test_the_first_frame_of_an_animation_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        (image,) = given_images("image", tmp_path / "x.gif")
    assert np.asarray(image)[0, 0].tolist() == [255, 0, 0]
    assert "has several frames: the first one is used" in caplog.text


@pytest.mark.parametrize(("height", "width"), [(96, 160), (64, 64)])
@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_mask_is_prepared_as_in_diffusers(height: int, width: int, mode: str, tmp_path: Path) -> None:
    """Of another size than the image, and not only black and white."""
    noise("L", 13, 9).resize((130, 90), Image.Resampling.BICUBIC).convert(mode).save(tmp_path / "x.png")
    (mask,) = given_images("mask", tmp_path / "x.png", mask=True)
    found = prepared_mask(mask, height, width, 32)
    assert found.shape == (1, 1, height // 32, width // 32)
    assert set(np.unique(found)) == {0.0, 1.0}
    np.testing.assert_array_equal(found, np.asarray(mask_latents(load_image(str(tmp_path / "x.png")), height, width, 32)))


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.uint8])
def test_a_mask_may_be_an_array(dtype: Any) -> None:
    array = np.zeros((96, 160), dtype)
    array[:, 64:] = 255 if dtype == np.uint8 else 1
    wanted = np.zeros((1, 1, 3, 5), np.float32)
    wanted[..., 2:] = 1
    for given in (array, array[..., np.newaxis]):
        (mask,) = given_images("mask", given, mask=True)
        np.testing.assert_array_equal(prepared_mask(mask, 96, 160, 32), wanted)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and has nothing in it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + end


def write_bad(kind: str, folder: Path) -> Path:
    path = folder / "x.png"
    if kind == "huge":
        path.write_bytes(png_header(20_000, 20_000))
    elif kind == "larger than the limit":
        path.write_bytes(png_header(11_600, 11_600))
    elif kind == "truncated":
        noise().save(path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "PostScript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "floats":
        path = folder / "x.tiff"
        Image.fromarray(np.zeros((8, 8), np.float32)).save(path)
    elif kind == "32 bits":
        path = folder / "x.tiff"
        Image.fromarray(np.zeros((8, 8), np.int32)).save(path)
    return path


#: What is wrong with a file, and what is said about it.
BAD_FILES = {
    "none": ("there is no image {path}", "no such file"),
    "folder": ("there is no image {path}", "a folder"),
    "empty": ("{path} is not an image", "a file of another kind"),
    "text": ("{path} is not an image", "a file of another kind"),
    "PostScript": ("{path} is not an image", "a file of another kind"),
    "truncated": ("{path} is damaged", "truncated"),
    "huge": ("{path} is too large", "400000000 pixels"),
    "larger than the limit": ("{path} is too large", "11600x11600 (height x width)"),
    "floats": ("{path} has floating-point pixels", "mode F"),
    "32 bits": ("{path} has 32-bit pixels", "mode I"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = write_bad(kind, tmp_path)
    message, found = BAD_FILES[kind]
    with pytest.raises(UsageError) as caught:
        given_images("image", path)
    assert caught.value.message == message.format(path=path)
    assert found in str(caught.value.found)


def test_a_huge_image_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UsageError, match="too large"):
        given_images("image", write_bad("larger than the limit", tmp_path))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "image is not an image"),
        (b"x", "image is not an image"),
        ([], "wrong length"),
        ([noise(), None], "image[1] is not an image"),
        ("", "is not a path"),
        (np.zeros((3, 8, 8), np.float32), "an array of shape [3, 8, 8]"),
        (np.zeros((8, 8), np.uint8), "an array of shape [8, 8]"),
        (np.zeros((8, 8, 4), np.uint8), "an array of shape [8, 8, 4]"),
        (np.zeros((0, 8, 3), np.uint8), "an array of shape [0, 8, 3]"),
        (np.zeros((8, 8, 3), np.int64), "image has the wrong dtype"),
        (np.full((8, 8, 3), 1.5), "1.5 to 1.5"),
        (np.full((8, 8, 3), -0.5), "-0.5 to -0.5"),
        (np.full((8, 8, 3), np.nan), "nan to nan"),
        (np.full((8, 8, 3), np.inf), "inf to inf"),
    ],
)
def test_what_is_not_an_image_is_refused(value: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        given_images("image", value)
    assert words in f"{caught.value.message} {caught.value.found}"


def test_large_arrays_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_SOURCE_PIXELS", 99)
    with pytest.raises(UsageError, match="too large") as caught:
        given_images("image", np.zeros((10, 10, 3), np.float32))
    assert caught.value.found == "10x10 (height x width)"


def test_which_image_each_drawn_image_starts_from() -> None:
    assert image_for_each("image", 1, 2, 2) == (0, 0, 0, 0)
    assert image_for_each("image", 2, 2, 2) == (0, 0, 1, 1)
    assert image_for_each("image", 4, 2, 2) == (0, 1, 2, 3)
    with pytest.raises(UsageError, match="number of images in image") as caught:
        image_for_each("image", 3, 2, 2)
    assert caught.value.found == "3 images for 2 prompts with 2 images each"
    assert caught.value.wanted == "1 for all, or 2, one for each prompt, or 4, one for each image"
