"""Closed standard streams, and texts that begin with a dash."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_export.cli.main import parse
from sana_export.errors import UsageError
from tests.support.command_line import Cli, command


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("json_option", ["", "--json"])
def test_closed_streams(streams: str, json_option: str, tmp_path: Path) -> None:
    for arguments, code in ((("variants",), 0), (("--version",), 0), (("inspect", "nothing"), 4), (("generate",), 2)):
        words = [*command(*arguments), *([json_option] if json_option and arguments[0] != "--version" else [])]
        done = subprocess.run(["sh", "-c", f"{shlex.join(words)} {streams}"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if ">&-" not in streams.replace("2>&-", "") and json_option and code == 0 and arguments[0] == "variants":
            json.loads(done.stdout)


def test_a_file_does_not_take_the_place_of_a_closed_stream(tiny_bundle: Path, tmp_path: Path) -> None:
    """The first file that is opened would get descriptor 1, and what is printed there would be in it."""
    words = shlex.join(command("generate", tiny_bundle, "x", "-o", "a.png", "--steps", 1, "--seed", 1, "--json"))
    done = subprocess.run(["sh", "-c", f"{words} >&-"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--negative-prompt -ugly", "negative_prompt", "-ugly"),
        ("--negative-prompt=-ugly", "negative_prompt", "-ugly"),
        ("--negative-prompt --ugly", "negative_prompt", "--ugly"),
        ("--negative-prompt -", "negative_prompt", "-"),
        ("--lora -x.safetensors --lora -y:0.5", "lora", ["-x.safetensors", "-y:0.5"]),
        ("-o -b.png", "output", Path("-b.png")),
        ("--guidance-scale -1e0", "guidance_scale", -1.0),
        ("--seed -3", "seed", -3),
        ("--json -- -ugly -o", "prompts", ["-ugly", "-o"]),
        ("'-a text with spaces'", "prompts", ["-a text with spaces"]),
        ("-5", "prompts", ["-5"]),
    ],
)
def test_a_text_that_begins_with_a_dash(words: str, name: str, value: object) -> None:
    prompt = [] if name == "prompts" else ["a fox"]
    options = parse(["generate", "bundle", *prompt, "-o", "a.png", *shlex.split(words)])
    assert getattr(options, name) == value


@pytest.mark.parametrize(
    ("words", "found", "wanted", "fix"),
    [
        ("generate b -o a.png -ugly", "-ugly", "-- before a text", "sana-export generate b -o a.png -- -ugly"),
        ("generate b x -o a.png --wdth 3", "--wdth", "--width?", "sana-export generate --help"),
        ("generate b x -o a.png --seed --steps 3", None, None, "sana-export generate --help"),
        ("variants x", "x", None, "sana-export variants --help"),
    ],
)
def test_a_word_that_is_no_option(words: str, found: str | None, wanted: str | None, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(shlex.split(words))
    assert caught.value.message == (f"unrecognized argument {found!r}" if found else "argument --seed: expected one argument")
    assert (wanted or "") in str(caught.value.wanted)
    assert caught.value.fix == fix


def test_a_negative_prompt_with_a_dash_is_the_same_text(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    for name, words in (("a.npy", ("--negative-prompt", "-ugly")), ("b.npy", ("--negative-prompt=-ugly",))):
        assert cli("generate", tiny_bundle, "x", "-o", tmp_path / name, "--steps", 1, "--seed", 1, *words, "-q").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("x:0,5", "the scale of the LoRA x has a comma", "--lora x:0.5"),
        ("my lora:-1,25", "has a comma", "--lora 'my lora:-1.25'"),
        ("x:1e30", "is out of range", None),
        ("x:nan", "is out of range", None),
    ],
)
def test_the_scale_of_a_lora(text: str, message: str, fix: str | None, tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("generate", tiny_bundle, "x", "-o", tmp_path / "a.png", "--lora", text)
    assert ran.code == 2
    assert message in ran.err
    assert fix is None or fix in ran.err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--guidance-scale", value) for value in ("1e30", "nan", "inf")),
        *(("--pag-scale", value) for value in ("1e30", "-1")),
        ("--steps", "1000000000"),
        ("--steps", "9" * 5000),
        ("--images-per-prompt", "100000"),
        ("--height", "1000000"),
        ("--seed", "9" * 30),
        ("--decoder-tile", "999999999"),
        ("--threads", "1000000"),
        ("--device", "99999999999"),
    ],
)
def test_numbers_are_checked_before_the_bundle_is_loaded(
    option: str, value: str, tiny_bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    ran = cli("generate", tmp_path / "no bundle", "x", "-o", tmp_path / "a.png", option, value)
    assert ran.code == 2, ran.err
    assert "not a bundle" not in ran.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize(("arguments", "code"), [(("variants",), 3), (("variants", "--json"), 3), (("inspect", "no", "--json"), 4)])
def test_a_stdout_that_is_full(arguments: tuple[str, ...], code: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_the_start_of_an_option_names_the_option(tiny_bundle: Path, cli: Cli) -> None:
    assert "--negative-prompt?" in cli("generate", tiny_bundle, "x", "-o", "a.png", "--neg", "dark").err


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "BUNDLE", "--backend", "tensorrt-rtx", "--batch", "99999999999", "--dry-run"),
        ("build", "BUNDLE", "--backend", "tensorrt-rtx", "--height", "3200000000", "--width", "32", "--dry-run"),
        ("build", "BUNDLE", "--backend", "tensorrt-rtx", "--profile", "static-99999999968", "--dry-run"),
        ("verify", "BUNDLE", "--ranges", "--threads", "99999999"),
        ("verify", "BUNDLE", "--reference", "tiny", "--seed", "9" * 26),
        ("bench", "BUNDLE", "--reference", "tiny", "--threads", "99999999"),
        ("bench", "--decoders", "tiny-dc-ae", "--rounds", "9" * 17),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_numbers_of_other_verbs_have_limits(arguments: tuple[str, ...], tiny_bundle: Path, cli: Cli) -> None:
    ran = cli(*(tiny_bundle if word == "BUNDLE" else word for word in arguments))
    assert ran.code == 2, ran.err
