"""`generate --from-image` draws an image again that `generate` drew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export import SanaRuntime, read_metadata, save_image
from sana_export.runtime import images
from tests.support.command_line import Cli
from tests.support.lora_files import diffusers_lora, load_transformer

SMALL = ("--height", 64, "--width", 96, "--no-resolution-binning", "--steps", 2)
SETTINGS: dict[str, Any] = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_it_is_the_same_file(suffix: str, tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    options = ("--guidance-scale", 3.5, "--pag-scale", 1.5, "--negative-prompt", "blurry")
    first, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    assert cli("generate", tiny_bundle, "a 🐼", "-o", first, *SMALL, *options).code == 0
    assert cli("generate", tiny_bundle, "--from-image", first, "-o", again).code == 0
    assert first.read_bytes() == again.read_bytes()


def test_each_of_several_images_of_one_seed(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    cli("generate", tiny_bundle, "a cat", "a dog", "-o", tmp_path / "x.png", *SMALL, "--seed", 1, "--images-per-prompt", 2)
    for number in range(4):
        image = tmp_path / f"x-{number}.png"
        ran = cli("generate", tiny_bundle, "--from-image", image, "-o", tmp_path / "again.png", "--json")
        assert [found["path"] for found in ran.json["images"]] == [str(tmp_path / "again.png")]
        assert (tmp_path / "again.png").read_bytes() == image.read_bytes()
        (tmp_path / "again.png").unlink()


def test_options_replace_what_is_recorded(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path, cli: Cli) -> None:
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL, "--seed", 1, "--negative-prompt", "ugly")
    for options, words in (
        (("--seed", 2), {"seed": 2}),
        (("a dog",), {"prompt": "a dog"}),
        (("--negative-prompt", ""), {"negative_prompt": ""}),
        (("--steps", 1, "--height", 96), {"num_inference_steps": 1, "height": 96}),
    ):
        assert cli("generate", tiny_bundle, *options, "--from-image", tmp_path / "x.png", "-o", tmp_path / "y.png").code == 0
        wanted = tiny_runtime(**{"prompt": "a cat", "seed": 1, "negative_prompt": "ugly", **SETTINGS, **words}).images[0]
        np.testing.assert_array_equal(pixels(tmp_path / "y.png"), np.asarray(wanted))


def test_a_prompt_may_stand_anywhere(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    options = ("-o", tmp_path / "x.png", *SMALL, "--seed", 1)
    for words in (("a cat", *options), (*options, "a cat"), (*options[:2], "a cat", *options[2:])):
        assert cli("generate", tiny_bundle, *words, "--json").json["images"][0]["prompt"] == "a cat"


def test_a_new_seed_draws_new_images(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    """The stream of noise that the image was part of no longer matters."""
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL, "--seed", 1, "--images-per-prompt", 2)
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "one.png", *SMALL, "--seed", 5)
    cli("generate", tiny_bundle, "--from-image", tmp_path / "x-1.png", "-o", tmp_path / "y.png", "--seed", 5)
    np.testing.assert_array_equal(pixels(tmp_path / "y.png"), pixels(tmp_path / "one.png"))


def test_several_prompts_are_all_drawn(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL, "--seed", 1, "--images-per-prompt", 2)
    for name in ("x-0.png", "x-1.png"):
        ran = cli("generate", tiny_bundle, "b", "c", "--from-image", tmp_path / name, "-o", tmp_path / "y.png", "--json")
        assert ran.code == 0
        assert [(Path(found["path"]).name, found["prompt"]) for found in ran.json["images"]] == [("y-0.png", "b"), ("y-1.png", "c")]


def test_given_steps_replace_recorded_ones_of_another_kind(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    again = ("--scheduler", "euler")
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL, "--seed", 1)
    ran = cli(
        "generate",
        tiny_bundle,
        "--from-image",
        tmp_path / "x.png",
        "-o",
        tmp_path / "y.png",
        *again,
        "--sigmas",
        "0.9,0.6,0.3",
        "--json",
    )
    assert (ran.code, ran.json["steps"]) == (0, 3)
    ran = cli("generate", tiny_bundle, "--from-image", tmp_path / "y.png", "-o", tmp_path / "z.png", "--steps", 1, "--json")
    assert (ran.code, ran.json["steps"]) == (0, 1)


def test_another_image_than_the_recorded_one_is_a_warning(
    img2img_bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    opened = images._opened
    monkeypatch.setattr(images, "_opened", lambda path: reads.append(path) or opened(path))
    for name, color in (("in.png", "red"), ("other.png", "blue")):
        Image.new("RGB", (96, 64), color).save(tmp_path / name)
    options = ("--image", tmp_path / "in.png", "--seed", 1)
    cli("generate", img2img_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL, *options)
    assert len(reads) == 1, "the image is read once"
    again = ("generate", img2img_bundle, "--from-image", tmp_path / "x.png", "-o", tmp_path / "y.png")
    ran = cli(*again, "--image", tmp_path / "in.png")
    assert (ran.code, "differ" in ran.err) == (0, False)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    ran = cli(*again, "--image", tmp_path / "other.png")
    assert "was drawn with another image for --image" in ran.err


def test_a_file_names_no_file_of_this_machine(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL)
    document = read_metadata(tmp_path / "x.png")
    document["request"]["image"] = str(tmp_path / "x.png")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "z.png", document)
    ran = cli("generate", tiny_bundle, "--from-image", tmp_path / "z.png", "-o", tmp_path / "y.png")
    assert ran.code == 2
    assert "values that only you may give" in ran.err


def test_loras_have_to_be_given_again(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path, cli: Cli) -> None:
    transformer = load_transformer(tiny_checkpoint)
    lora = diffusers_lora(transformer, tmp_path / "style", r=4, lora_alpha=7)
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL, "--lora", f"{lora}:0.5")
    again = ("generate", tiny_bundle, "--from-image", tmp_path / "x.png", "-o", tmp_path / "y.png")
    ran = cli(*again)
    assert ran.code == 2
    assert "was drawn with LoRAs" in ran.err
    assert f"--from-image {tmp_path / 'x.png'} -o {tmp_path / 'y.png'} --lora style:0.5" in ran.err
    assert not (tmp_path / "y.png").exists()
    ran = cli(*again, "--lora", f"{lora}:0.5")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    assert "other LoRAs" in cli(*again, "--lora", f"{lora}:0.6").err


def test_another_model_is_a_warning(tiny_bundle: Path, sprint_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL)
    ran = cli("generate", sprint_bundle, "--from-image", tmp_path / "x.png", "-o", tmp_path / "y.png")
    assert ran.code == 0
    assert "was drawn with tiny-random in fp32" in ran.err
    assert "the image will differ" in ran.err


def test_what_no_file_has_is_named(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path, cli: Cli) -> None:
    encoded = tiny_runtime.encode_prompt("a cat", negative_prompt="ugly")
    result = tiny_runtime(**encoded.arrays, seed=1, **SETTINGS)
    save_image(result.images[0], tmp_path / "x.png", result.metadata[0])
    again = ("generate", tiny_bundle, "--from-image", tmp_path / "x.png", "-o", tmp_path / "y.png")
    ran = cli(*again)
    assert ran.code == 2
    assert "runtime(prompt_embeds=...)" in ran.err
    assert "runtime(negative_prompt_embeds=...)" in ran.err
    assert cli(*again, "a cat", "--negative-prompt", "ugly").code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "y.png"), np.asarray(result.images[0]))


def test_images_have_to_be_given_again(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL)
    picture, document = Image.new("RGB", (96, 64)), read_metadata(tmp_path / "x.png")
    save_image(picture, tmp_path / "x.png", {**document, "given": {"image": "ab" * 32}})
    again = ("generate", tiny_bundle, "--from-image", tmp_path / "x.png", "-o", tmp_path / "y.png")
    assert "image with sha256 abab" in cli(*again).err
    picture.save(tmp_path / "in.png")
    # Now the request is complete. This bundle has no encoder for it.
    assert "img2img" in cli(*again, "--image", tmp_path / "in.png").err


def test_files_that_do_not_say(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "silent.png", *SMALL, "--no-metadata")
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.npy", *SMALL)
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL)
    document = read_metadata(tmp_path / "x.png")
    for name, change in (
        ("later", {"format": 9}),
        ("odd", {"request": {"prompt": "a", "magic": 1}}),
        ("steps", {"request": {"prompt": "a", "num_inference_steps": 10**9}}),
    ):
        save_image(
            Image.new("RGB", (8, 8)),
            tmp_path / f"{name}.png",
            {**document, **change, "request": {**document["request"], **change.get("request", {})}},
        )
    before = sorted(tmp_path.iterdir())
    for name, words in (
        ("plain.png", "does not say how it was drawn"),
        ("silent.png", "without --no-metadata"),
        ("x.npy", "is not an image"),
        ("nothing.png", "there is no image"),
        ("later.png", "format 9"),
        ("odd.png", "'magic'"),
        ("steps.png", "num_inference_steps is out of range"),
    ):
        ran = cli("generate", tiny_bundle, "--from-image", tmp_path / name, "-o", tmp_path / "y.png")
        assert ran.code == 2, name
        assert words in ran.err
    assert sorted(tmp_path.iterdir()) == before


def test_no_path_of_this_machine_is_in_a_file(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "secret" / "bundle")
    for suffix in (".png", ".jpg", ".webp"):
        assert cli("generate", bundle, "a cat", "-o", tmp_path / f"x{suffix}", *SMALL).code == 0
        content = (tmp_path / f"x{suffix}").read_bytes()
        assert b"tiny-random" in content
        assert b"secret" not in content
        assert "secret".encode("utf-16-be") not in content
