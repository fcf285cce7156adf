"""Image files carry how they were drawn, in the places where viewers look, and as the exact document."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export import read_metadata, save_image
from sana_export.errors import UsageError
from sana_export.image_files import readable

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
DOCUMENT: dict[str, Any] = {
    "sana_export": "0.1.0",
    "format": 1,
    "model": {"name": "Sana_1600M", "sha256": "ab" * 32, "precision": "fp16"},
    "backend": "onnxruntime",
    "sampler": "DPMSolverMultistep",
    "steps": 20,
    "loras": [{"name": "style, old: 2.safetensors", "scale": 0.7, "sha256": "cd" * 32}],
    "request": {
        "prompt": "a 🐼, (red:1.2)\nin two lines",
        "negative_prompt": "ugly",
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
        "pag_scale": 2.0,
        "height": 48,
        "width": 64,
        "seed": 7,
    },
}
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".PNG")


def a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, as AUTOMATIC1111's web UI parses them (`parse_generation_parameters`)."""
    *lines, last = text.strip().split("\n")
    prompt, negative, into = [], [], "prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            into, line = "negative", line.removeprefix("Negative prompt:").strip()
        (prompt if into == "prompt" else negative).append(line)
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    settings = {key: json.loads(value) if value.startswith('"') else value for key, value in found}
    return "\n".join(prompt), "\n".join(negative), settings


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_document_comes_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"x{suffix}"
    save_image(PICTURE, path, DOCUMENT)
    assert read_metadata(path) == DOCUMENT
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_readable_text_is_what_viewers_parse() -> None:
    prompt, negative, settings = a1111(readable(DOCUMENT))
    assert (prompt, negative) == ("a 🐼, (red:1.2)\nin two lines", "ugly")
    assert settings == {
        "Steps": "20",
        "Sampler": "DPMSolverMultistep",
        "CFG scale": "4.5",
        "Seed": "7",
        "Size": "64x48",
        "Model hash": "ababababab",
        "Model": "Sana_1600M",
        "pag scale": "2",
        "Lora hashes": "style, old: 2.safetensors: cdcdcdcdcdcd",
        "Version": "sana-export 0.1.0",
    }


def test_it_is_where_viewers_look(tmp_path: Path) -> None:
    for suffix in FORMATS:
        save_image(PICTURE, tmp_path / f"x{suffix}", DOCUMENT)
        with Image.open(tmp_path / f"x{suffix}") as image:
            if suffix.lower() == ".png":
                assert image.info["parameters"] == readable(DOCUMENT)
                continue
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == readable(DOCUMENT)
            assert json.loads(image.getexif()[0x010E].removeprefix("sana_export: ")) == DOCUMENT


@pytest.mark.parametrize("suffix", FORMATS)
def test_without_metadata_there_is_none(suffix: str, tmp_path: Path) -> None:
    save_image(PICTURE, tmp_path / f"x{suffix}")
    with Image.open(tmp_path / f"x{suffix}") as image:
        assert not image.getexif()
        assert not {"parameters", "sana_export", "exif"} & image.info.keys()
    with pytest.raises(UsageError, match="does not say how it was drawn") as error:
        read_metadata(tmp_path / f"x{suffix}")
    assert error.value.found == "no parameters"


def test_quality_makes_files_smaller(tmp_path: Path) -> None:
    for suffix in (".jpg", ".webp"):
        sizes = []
        for quality in (10, 60, None):
            save_image(PICTURE, tmp_path / f"x{suffix}", DOCUMENT, quality=quality)
            sizes.append((tmp_path / f"x{suffix}").stat().st_size)
        assert sizes == sorted(set(sizes))
    with Image.open(tmp_path / "x.webp") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE), "webp is lossless without a quality")


@pytest.mark.parametrize(
    ("name", "quality", "words"),
    [
        ("x.png", 90, "the format png has no quality"),
        ("x.npy", 90, "the format npy has no quality"),
        ("x.jpg", 0, "quality is out of range"),
        ("x.jpg", 101, "quality is out of range"),
        ("x.jpg", "high", "quality is not an integer"),
        ("x.gif", None, "not the name of an image file"),
        ("x", None, "not the name of an image file"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(name: str, quality: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        save_image(PICTURE, tmp_path / name, quality=quality)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_of_any_length_leaves_the_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = {**DOCUMENT, "request": {**DOCUMENT["request"], "prompt": "é" * 100_000}}
    for suffix in (".png", ".webp"):
        save_image(PICTURE, tmp_path / f"x{suffix}", long)
        assert read_metadata(tmp_path / f"x{suffix}") == long
    assert not caplog.messages
    save_image(PICTURE, tmp_path / "x.jpg", long)
    assert "use png or webp" in caplog.text
    with pytest.raises(UsageError, match="does not say"):
        read_metadata(tmp_path / "x.jpg")


def test_only_files_of_our_formats_are_opened(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "x.tiff")
    with pytest.raises(UsageError, match="is not an image"):
        read_metadata(tmp_path / "x.tiff")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(UsageError, match="is not an image") as error:
            read_metadata(tmp_path / "pipe.png")
        assert error.value.found == "not a regular file"


def test_files_of_others(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Seed: 1")
    PICTURE.save(tmp_path / "theirs.png", pnginfo=info)
    for key, text in (("broken", "{"), ("list", "[1]"), ("deep", "[" * 100_000), ("nan", '{"a": ')):
        info = PngInfo()
        info.add_text("sana_export", text)
        PICTURE.save(tmp_path / f"{key}.png", pnginfo=info)
        with pytest.raises(UsageError, match="damaged"):
            read_metadata(tmp_path / f"{key}.png")
    (tmp_path / "x.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "theirs.png").read_bytes()[:20])
    np.save(tmp_path / "x.npy", np.zeros((2, 2, 3)))
    for name, words in (
        ("theirs.png", "parameters of another program"),
        ("x.png", "is not an image"),
        ("cut.png", "is not an image"),
        ("x.npy", "is not an image"),
        ("nothing.png", "there is no image"),
        (".", "is not an image"),
    ):
        with pytest.raises(UsageError, match=words):
            read_metadata(tmp_path / name)
