"""`generate` writes the runtime's images under the documented names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export.cli.images import write_images
from tests.support.command_line import Cli

SMALL = ("--height", 64, "--width", 96, "--no-resolution-binning", "--steps", 2)
SETTINGS = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2}


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_one_image_equals_the_runtimes(tiny_bundle: Path, tiny_runtime: Any, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / "new" / "panda.png"
    options = ("--seed", 7, "--guidance-scale", 3.5, "--pag-scale", 1.5, "--negative-prompt", "blurry")
    ran = cli("generate", tiny_bundle, "a 🐼", "-o", output, *SMALL, *options, "--json")
    assert ran.code == 0
    wanted = tiny_runtime("a 🐼", **SETTINGS, seed=7, guidance_scale=3.5, pag_scale=1.5, negative_prompt="blurry").images[0]
    assert np.array_equal(pixels(output), np.asarray(wanted))
    other = tiny_runtime("a 🐼", **SETTINGS, seed=7).images[0]
    assert not np.array_equal(pixels(output), np.asarray(other))
    assert ran.json["images"] == [{"path": str(output), "prompt": "a 🐼"}]
    assert (ran.json["seeds"], ran.json["height"], ran.json["width"], ran.json["steps"]) == ([7], 64, 96, 2)
    assert ran.json["backend"] == "onnxruntime"
    assert len(ran.json["seconds"]["denoise"]) == 2
    assert [path.name for path in output.parent.iterdir()] == ["panda.png"]


def test_another_scheduler(tiny_bundle: Path, tiny_runtime: Any, tmp_path: Path, cli: Cli) -> None:
    size, settings = SMALL[:-2], {**SETTINGS, "num_inference_steps": None}
    for name, options, given in (
        ("unipc", ("--scheduler", "unipc", "--steps", 4), {"scheduler": "unipc", "num_inference_steps": 4}),
        ("heun", ("--scheduler", "heun", "--steps", 2), {"scheduler": "heun", "num_inference_steps": 2}),
        ("euler", ("--scheduler", "euler", "--sigmas", "1,0.6,0.2"), {"scheduler": "euler", "sigmas": [1, 0.6, 0.2]}),
        (
            "json",
            ("--scheduler", '{"flow_shift": 5.0}', "--steps", 3),
            {"scheduler": {"flow_shift": 5.0}, "num_inference_steps": 3},
        ),
    ):
        output = tmp_path / f"{name}.png"
        ran = cli("generate", tiny_bundle, "a cat", "-o", output, *size, "--seed", 7, *options, "--json")
        wanted = tiny_runtime("a cat", seed=7, **{**settings, **given})
        assert np.array_equal(pixels(output), np.asarray(wanted.images[0]))
        assert ran.json["scheduler"] == wanted.scheduler
        assert ran.json["steps"] == len(ran.json["seconds"]["denoise"]) == {"unipc": 4}.get(name, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheduler", "unipcc"), "--scheduler unipc"),
        (("--scheduler", "{1}"), "is not JSON"),
        (("--sigmas", "1;2"), "is not a list of numbers"),
        (("--sigmas", "1,2,nan"), "an item of sigmas is out of range"),
        (("--sigmas", "0.5"), "takes no custom sigmas"),
        (("--scheduler", "euler", "--timesteps", "100,200"), "do not make a schedule"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be(tiny_bundle: Path, tmp_path: Path, cli: Cli, options: tuple[str, ...], words: str) -> None:
    ran = cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *options)
    assert ran.code == 2
    assert words in ran.err
    assert not list(tmp_path.iterdir())


def test_guidance_in_an_interval(tiny_bundle: Path, tiny_runtime: Any, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / "x.png"
    options = ("--seed", 7, "--guidance-interval", 0.5, 1, "--pag-scale", 2, "--pag-interval", 0, 0.5)
    ran = cli("generate", tiny_bundle, "a 🐼", "-o", output, *SMALL, *options, "--json")
    wanted = tiny_runtime("a 🐼", **SETTINGS, seed=7, guidance_interval=(0.5, 1), pag_scale=2, pag_interval=(0, 0.5))
    assert np.array_equal(pixels(output), np.asarray(wanted.images[0]))
    assert (ran.json["guidance_interval"], ran.json["pag_interval"]) == ([0.5, 1], [0, 0.5])
    ran = cli("generate", tiny_bundle, "a 🐼", "-o", tmp_path / "y.png", *SMALL, "--guidance-interval", 0.2, "nan")
    assert ran.code == 2
    assert "the stop of guidance_interval is out of range" in ran.err
    assert not (tmp_path / "y.png").exists()


def test_several_images_are_numbered_prompt_by_prompt(tiny_bundle: Path, tiny_runtime: Any, tmp_path: Path, cli: Cli) -> None:
    prompts = ["a cat", "a dog"]
    output = tmp_path / "x.png"
    ran = cli("generate", tiny_bundle, *prompts, "-o", output, *SMALL, "--seed", 1, "--images-per-prompt", 2, "--json")
    wanted = tiny_runtime(prompts, **SETTINGS, seed=1, num_images_per_prompt=2).images
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.png", "x-1.png", "x-2.png", "x-3.png"]
    for index, image in enumerate(wanted):
        assert np.array_equal(pixels(tmp_path / f"x-{index}.png"), np.asarray(image))
    assert [image["prompt"] for image in ran.json["images"]] == ["a cat", "a cat", "a dog", "a dog"]


def test_a_reported_random_seed_gives_the_same_image(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    first = cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "a.png", *SMALL, "--json").json
    cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "b.png", *SMALL, "--seed", first["seeds"][0])
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_npy_holds_floats_that_round_to_the_image(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    for name in ("x.npy", "x.png"):
        assert cli("generate", tiny_bundle, "a cat", "-o", tmp_path / name, *SMALL, "--seed", 3).code == 0
    values = np.load(tmp_path / "x.npy")
    assert (values.dtype, values.shape) == (np.float32, (64, 96, 3))
    assert np.abs(values * 255 - pixels(tmp_path / "x.png")).max() <= 0.501


@pytest.mark.parametrize(("suffix", "format"), [(".jpg", "JPEG"), (".webp", "WEBP"), (".PNG", "PNG")])
def test_the_suffix_chooses_the_format(suffix: str, format: str, tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / f"x{suffix}"
    assert cli("generate", tiny_bundle, "a cat", "-o", output, *SMALL).code == 0
    with Image.open(output) as image:
        assert (image.format, image.size) == (format, (96, 64))


@pytest.mark.parametrize("name", ["x", "x.tif", "x.txt", "."])
def test_an_output_that_is_not_an_image_file_is_a_usage_error(name: str, tmp_path: Path, cli: Cli) -> None:
    ran = cli("generate", tmp_path / "no bundle", "a cat", "-o", tmp_path / name)
    assert ran.code == 2
    assert ".png" in ran.err


def test_the_output_is_checked_before_anything_is_computed(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("not a folder")
    ran = cli("generate", tmp_path / "no bundle", "a cat", "-o", tmp_path / "file" / "x.png")
    assert ran.code == 3
    assert "cannot be written" in ran.err
    assert cli("generate", tmp_path / "no bundle", "a cat", "-o", "/proc/nowhere/x.png").code == 3


@pytest.mark.parametrize(
    ("size", "word"), [(("--height", 100, "--width", 96), "96x96 or 128x96"), (("--height", 0, "--width", 96), "--help")]
)
def test_sizes_that_do_not_fit(size: tuple[object, ...], word: str, tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *size, "--no-resolution-binning")
    assert ran.code == 2
    assert word in ran.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_lists_the_known_ones(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", "--backend", "openvino")
    assert ran.code == 2
    assert "onnxruntime" in ran.err


def test_a_prompt_that_is_too_long_is_truncated_with_a_warning(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("generate", tiny_bundle, "word salad " * 200, "-o", tmp_path / "x.png", *SMALL)
    assert ran.code == 0
    assert "warning: " in ran.err
    assert "300" in ran.err


def test_a_failed_write_keeps_the_older_image(tmp_path: Path) -> None:
    class Broken:
        def save(self, file: Any, **_: object) -> None:
            file.write(b"half")
            raise ValueError("no more")

    output = tmp_path / "x.png"
    output.write_bytes(b"an older image")
    with pytest.raises(ValueError, match="no more"):
        write_images([Broken()], output)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.png", b"an older image")]
