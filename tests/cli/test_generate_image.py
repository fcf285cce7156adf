"""`generate --image`: the runtime's images, and for every kind of bad input the documented exit code and a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.runtime.test_images import write_bad
from tests.runtime.test_img2img import picture, white_disk
from tests.support.command_line import Cli

SMALL = ("--height", 64, "--width", 96, "--no-resolution-binning", "--steps", 4)
SETTINGS = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 4}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture().save(tmp_path / "in.png")
    return tmp_path / "in.png"


def test_images_from_an_image_and_a_mask(img2img_bundle: Path, img2img_runtime: Any, image: Path, tmp_path: Path, cli: Cli) -> None:
    white_disk().save(tmp_path / "mask.png")
    options = ("--image", image, "--strength", 0.5, "--mask", tmp_path / "mask.png", "--seed", 7)
    ran = cli("generate", img2img_bundle, "a 🐼", "-o", tmp_path / "out.png", *SMALL, *options, "--json")
    assert ran.code == 0, ran.err
    given = {"image": picture(), "mask": white_disk(), "strength": 0.5, "seed": 7}
    wanted = img2img_runtime("a 🐼", **SETTINGS, **given).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(wanted))
    assert ran.json["steps"] == 2
    assert ran.json["seconds"]["vae_encoder"] > 0
    ran = cli("generate", img2img_bundle, "a 🐼", "-o", tmp_path / "out.png", *SMALL, *options[:2])
    assert ran.code == 0
    assert "vae encoder" in ran.out


#: Options of a bad request, and words of the error. {bad} is a bad file.
BAD: list[tuple[str, tuple[Any, ...], tuple[str, ...]]] = [
    *(
        (kind, ("--image", "{bad}"), words)
        for kind, words in {
            "none": ("there is no image", "no such file"),
            "text": ("is not an image", "PNG, JPEG"),
            "truncated": ("is damaged", "whole image file"),
            "huge": ("is too large", "400000000 pixels"),
        }.items()
    ),
    ("text", ("--image", "{image}", "--mask", "{bad}"), ("is not an image",)),
    ("none", ("--image", "{image}", "--strength", 0), ("strength is out of range", "above 0, up to 1")),
    ("none", ("--image", "{image}", "--strength", 1.5), ("strength is out of range", "1.5")),
    ("none", ("--image", "{image}", "--strength", -1), ("strength is out of range", "-1")),
    ("none", ("--image", "{image}", "--strength", 1e-20), ("no step remains", "0.25 or more")),
    ("none", ("--strength", 0.5), ("strength has no meaning without an image", "--image")),
    ("none", ("--mask", "{image}"), ("mask has no meaning without an image", "--image")),
]


@pytest.mark.parametrize(("kind", "options", "words"), BAD)
def test_bad_input(
    kind: str, options: tuple[Any, ...], words: tuple[str, ...], img2img_bundle: Path, image: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "bad").mkdir()
    names = {"{bad}": write_bad(kind, tmp_path / "bad"), "{image}": image}
    given = [names.get(option, option) for option in options]
    ran = cli("generate", img2img_bundle, "a fox", "-o", tmp_path / "out.png", *SMALL, *given)
    assert ran.code == 2, ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err
    assert not (tmp_path / "out.png").exists()


def test_a_bundle_without_the_graph_names_the_export(tiny_bundle: Path, image: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("generate", tiny_bundle, "a fox", "-o", tmp_path / "out.png", *SMALL, "--image", image)
    assert ran.code == 4
    command = f"sana-export export tiny-random -o {tiny_bundle} --dtype fp32 --pag-layers transformer_blocks.1"
    assert f"{command} --graphs default,img2img" in ran.err


def test_a_recipe_and_the_command_line_take_groups(tmp_path: Path) -> None:
    from sana_export.cli.main import parse
    from sana_export.cli.recipe import load_recipe

    options = parse(["export", "tiny-random", "-o", str(tmp_path / "b"), "--graphs", "default,img2img"])
    assert options.graphs == ["default", "img2img"]
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "tiny-random"\noutput = "b"\ngraphs = ["default", "img2img"]\n')
    assert load_recipe(recipe).graphs == ("default", "img2img")
