"""`generate --prompts-file`: every line once, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export import SanaRuntime, read_metadata
from sana_export.cli.drawn_images import DrawnImages
from sana_export.cli.prompts_file import MOST_LINE_BYTES, SEED_STRIDE, BadLine, Item, read_items
from sana_export.errors import UsageError
from tests.support.command_line import Cli, command

SMALL = ("--height", 64, "--width", 96, "--no-resolution-binning", "--steps", 2)
SETTINGS: dict[str, Any] = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def drawn(runtime: SanaRuntime, prompt: str, **words: Any) -> np.ndarray:
    return np.asarray(runtime(prompt, **{**SETTINGS, **words}).images[0])


def images(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".jsonl", ".lock"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_text_is_one_prompt_a_line(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path, cli: Cli) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "new" / "out"
    file.write_bytes("\ufeffa red apple\r\n\n  # 1 🐼  \n\u2028\na {dog}".encode())
    ran = cli("generate", tiny_bundle, "--prompts-file", file, "-o", folder, *SMALL, "--seed", 7, "--json")
    assert ran.code == 0
    assert images(folder) == ["000001.png", "000003.png", "000005.png"]
    for number, prompt in ((1, "a red apple"), (3, "# 1 🐼"), (5, "a {dog}")):
        path = folder / f"{number:06d}.png"
        np.testing.assert_array_equal(pixels(path), drawn(tiny_runtime, prompt, seed=7 + number - 1))
        assert read_metadata(path)["request"]["prompt"] == prompt
    found = ran.json
    assert {name: found[name] for name in ("drawn", "kept", "failed", "failures", "seed", "format")} == {
        "drawn": 3,
        "kept": 0,
        "failed": 0,
        "failures": [],
        "seed": 7,
        "format": "png",
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_lines_of_json_have_words_of_their_own(
    batch: int, tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path, cli: Cli
) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a cat", "seed": 3, "negative_prompt": "ugly"},
        {"prompt": "a dog", "height": 96, "width": 64, "guidance_scale": 1.0},
        {"prompt": "a bee", "num_images_per_prompt": 2, "seed": 9},
        {"prompt": "a fox", "num_inference_steps": 1, "pag_scale": 1.0, "seed": [4]},
        {"prompt": "a cow", "num_images_per_prompt": 2, "height": None},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ("--seed", 50, "--batch", batch, "--negative-prompt", "dull", "--output-format", "webp")
    assert cli("generate", tiny_bundle, "--prompts-file", file, "-o", tmp_path / "out", *SMALL, *options).code == 0
    wanted = {
        "000001": {**lines[0]},
        "000002": {**lines[1], "seed": 51},
        "000003-0": {"prompt": "a bee", "seed": 9},
        "000003-1": {"prompt": "a bee", "seed": 9 + SEED_STRIDE},
        "000004": {**lines[3], "seed": 4},
        "000005-0": {"prompt": "a cow", "seed": 54},
        "000005-1": {"prompt": "a cow", "seed": 54 + SEED_STRIDE},
    }
    assert images(tmp_path / "out") == [f"{stem}.webp" for stem in wanted]
    for stem, words in wanted.items():
        expected = drawn(tiny_runtime, **{"negative_prompt": "dull", **words})
        np.testing.assert_array_equal(pixels(tmp_path / "out" / f"{stem}.webp"), expected)


BAD_LINES: list[tuple[bytes, str]] = [
    (b"{", "the line is not JSON"),
    (b"[1]", "not a JSON object"),
    (b"[" * 100_000, "the line is not JSON"),
    (b'{"seed": 1}', "prompt is not text"),
    (b'{"prompt": ["a"]}', "prompt is not text"),
    (b'{"prompt": "a", "negative_prompt": ["b"]}', "negative_prompt is not text"),
    (b'{"prompt": "a", "steps": 3}', "num_inference_steps"),
    (b'{"prompt": "a", "promt": "b"}', "prompt?"),
    (b'{"prompt": "a", "output_type": "np"}', "cannot have output_type"),
    (b'{"prompt": "a", "prompt_embeds": [[[1]]]}', "cannot have prompt_embeds"),
    (b'{"prompt": "a", "height": -1}', "height is out of range"),
    (b'{"prompt": "a", "guidance_scale": NaN}', "guidance_scale is out of range"),
    (b'{"prompt": "a", "seed": 99999999999999999999999}', "seed"),
    (b'{"prompt": "a", "seed": [1, 2]}', "number of seeds"),
    (b'{"prompt": "a", "num_images_per_prompt": 0}', "num_images_per_prompt is out of range"),
    (b'{"prompt": "\\ud800"}', "not Unicode"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "a", "height": 100}', "multiples of 32"),  # what only the bundle knows
    (b'{"prompt": "a", "max_sequence_length": 2048}', "max_sequence_length is too large"),  # what only the tokens show
]


def test_bad_lines_are_reported_and_the_others_drawn(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "prompts.jsonl"
    good = b'{"prompt": "a cat"}'
    file.write_bytes(b"\n".join([good, *(line for line, _ in BAD_LINES), good]))
    ran = cli("generate", tiny_bundle, "--prompts-file", file, "-o", tmp_path / "out", *SMALL, "--json", "--batch", 2)
    assert ran.code == 2
    assert images(tmp_path / "out") == ["000001.png", f"{len(BAD_LINES) + 2:06d}.png"]
    assert (ran.json["drawn"], ran.json["failed"]) == (2, len(BAD_LINES))
    failures = {failure["line"]: " ".join(map(str, failure.values())) for failure in ran.json["failures"]}
    for number, (_, words) in enumerate(BAD_LINES, 2):
        assert words in failures[number]
        assert f"error: prompts.jsonl, line {number}: " in ran.err
    again = cli("generate", tiny_bundle, "--prompts-file", file, "-o", tmp_path / "out", *SMALL, "--json", "--batch", 2)
    assert (again.code, again.json["drawn"], again.json["kept"]) == (2, 0, 2)


def test_a_line_without_an_end_takes_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    with file.open("wb") as target:
        target.write(b"a cat\n" + b"x" * (3 * MOST_LINE_BYTES) + b"\na dog\n")
    first, long, last = read_items(file, {}, 0)
    assert isinstance(long, BadLine)
    assert "too long" in long.error.message
    assert [item.words["prompt"] for item in (first, last) if isinstance(item, Item)] == ["a cat", "a dog"]
    assert (long.line, last.line) == (2, 3)


def test_the_same_command_draws_only_what_is_missing(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    arguments = ("generate", tiny_bundle, "--prompts-file", file, "-o", folder, *SMALL, "--json")
    file.write_text("a\nb\nc\n")
    seed = cli(*arguments).json["seed"]
    first = snapshot(folder)
    file.write_text("a\nb\nc\nd\n")  # more lines may follow
    (folder / "000002.png").unlink()
    (folder / "000003.png").write_bytes(first["000003.png"][:100])  # damaged
    (folder / ".000004.png.1-1.partial").write_bytes(b"half")
    with (folder / "index.jsonl").open("ab") as index:
        index.write(b'{"file": "000004.png", "li')  # a line that a kill has cut off
    ran = cli(*arguments)
    assert (ran.code, ran.json["drawn"], ran.json["kept"], ran.json["seed"]) == (0, 3, 1, seed)
    again = snapshot(folder)
    assert {name: again[name] for name in images(folder)[:3]} == {name: first[name] for name in images(folder)[:3]}
    assert images(folder) == [f"00000{number}.png" for number in range(1, 5)]
    # Nothing is left to draw, so nothing is loaded.
    assert cli(*arguments, "--backend", "tensorrt").json["kept"] == 4


def test_null_is_kept_where_it_is_not_the_default(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(
        '{"prompt": "a", "complex_human_instruction": null, "intermediate_timesteps": null, "height": null, "eta": 0}\n'
    )
    (item,) = read_items(file, {"height": 64}, 0)
    assert isinstance(item, Item)
    assert item.words == {"prompt": "a", "complex_human_instruction": None, "intermediate_timesteps": None, "height": 64, "seed": 0}


def test_only_what_is_ours_is_deleted(tmp_path: Path) -> None:
    ours, theirs = tmp_path / ".000001.png.12-34.partial", tmp_path / ".movie.mp4.partial"
    for path in (ours, theirs):
        path.write_bytes(b"half")
    (tmp_path / "index.jsonl").write_text("my own notes\n")
    with pytest.raises(UsageError, match="not the index"), DrawnImages.open(tmp_path, "png", 5):
        pass
    assert ours.exists()
    (tmp_path / "index.jsonl").write_bytes(b"")  # made by a process that was killed, or by hand
    with DrawnImages.open(tmp_path, "png", 5):
        assert (ours.exists(), theirs.exists()) == (False, True)
    with DrawnImages.open(tmp_path, "png", None) as folder:
        assert folder.seed == 5


def test_the_key_of_a_line_has_the_content_of_its_images(tmp_path: Path) -> None:
    picture, file = tmp_path / "in.png", tmp_path / "x.jsonl"
    file.write_text(json.dumps({"prompt": "a", "image": str(picture)}))
    keys = []
    for content in (b"one", b"another", b"one"):
        picture.write_bytes(content)  # no image: it is read when it is drawn
        (item,) = read_items(file, {}, 0)
        assert isinstance(item, Item)
        keys.append(item.key({}))
    assert keys[0] == keys[2] != keys[1]
    picture.unlink()
    (line,) = read_items(file, {}, 0)
    assert isinstance(line, BadLine)
    assert "there is no image" in line.error.message


def test_options_are_defaults_of_lines_with_images(img2img_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    file, folder = tmp_path / "x.jsonl", tmp_path / "out"
    for name, color in (("in.png", "red"), ("mask.png", "white")):
        Image.new("RGB", (96, 64), color).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    lines = [{"prompt": "a", "image": str(tmp_path / name)} for name in ("in.png", "bad.png")]
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "b"}])))
    arguments = ("generate", img2img_bundle, "--prompts-file", file, "-o", folder, *SMALL, "--json")
    ran = cli(*arguments, "--strength", 0.6, "--mask", tmp_path / "mask.png")
    assert images(folder) == ["000001.png"]
    assert read_metadata(folder / "000001.png")["request"]["strength"] == 0.6
    failures = {failure["line"]: failure["message"] for failure in ran.json["failures"]}
    assert "is not an image" in failures[2]
    assert "has no meaning without an image" in failures[3]
    for options, words in ((("--strength", 2), "strength is out of range"), (("--mask", "nothing.png"), "there is no image")):
        ran = cli(*arguments, *options)
        assert (ran.code, words in ran.err) == (2, True)
    (tmp_path / "x.txt").write_text("a")
    ran = cli("generate", img2img_bundle, "--prompts-file", tmp_path / "x.txt", "-o", tmp_path / "o", "--strength", 0.6)
    assert "strength has no meaning without an image" in ran.err


def test_an_edited_image_is_left_alone(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a\n")
    arguments = ("generate", tiny_bundle, "--prompts-file", file, "-o", folder, *SMALL)
    cli(*arguments)
    Image.new("RGB", (8, 8)).save(folder / "000001.png")
    ran = cli(*arguments)
    assert (ran.code, pixels(folder / "000001.png").shape) == (0, (8, 8, 3))
    assert "was changed after it was drawn" in ran.err


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a\nX\nc", ()),
        ("z\na\nb\nc", ()),
        (None, ("--steps", 1)),
        (None, ("--seed", 8)),
        (None, ("--guidance-scale", 2)),
        (None, ("--no-metadata",)),
        (None, ("--negative-prompt", "ugly")),
    ],
    ids=str,
)
def test_images_of_other_lines_or_settings_are_never_mixed_or_replaced(
    text: str | None, options: tuple[object, ...], tiny_bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a\nb\nc")
    arguments = ("generate", tiny_bundle, "--prompts-file", file, "-o", folder, *SMALL)
    assert cli(*arguments, "--seed", 7).code == 0
    before = snapshot(folder)
    file.write_text(text or "a\nb\nc")
    ran = cli(*arguments, *options)
    assert ran.code == 2
    assert "would be replaced by others" in ran.err
    assert f"-o {folder}-2" in ran.err
    assert snapshot(folder) == before


def test_files_that_are_not_ours_are_never_replaced(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a\nb\n")
    folder.mkdir()
    (folder / "000002.png").write_bytes(b"a holiday picture")
    arguments = ("generate", tiny_bundle, "--prompts-file", file, "-o", folder, *SMALL)
    ran = cli(*arguments)
    assert ran.code == 2
    assert "000002.png, which is not in index.jsonl" in ran.err
    assert images(folder) == ["000002.png"]
    (folder / "index.jsonl").write_text("my own notes\n")
    assert "is not the index of such a folder" in cli(*arguments).err
    assert (folder / "index.jsonl").read_text() == "my own notes\n"


def run_and_kill(arguments: list[str], folder: Path, count: int) -> None:
    """Start a command, and kill it when the folder has `count` images."""
    process = subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    try:
        while len(list(folder.glob("0*.png"))) < count:
            assert process.poll() is None, process.stderr.read() if process.stderr else None
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_killed_and_started_again_every_image_is_drawn_once(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("".join(f"a cat number {number}\n" for number in range(12)))
    arguments = command(
        "generate", tiny_bundle, "--prompts-file", file, "-o", folder, *SMALL, "--seed", 100, "--json", "--backend", "onnxruntime"
    )
    run_and_kill(arguments, folder, 4)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    assert 4 <= len(before) < 12
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert (found["kept"], found["drawn"]) == (len(before), 12 - len(before))
    assert images(folder) == [f"{number:06d}.png" for number in range(1, 13)]
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before, "what was there was not drawn again"
    for number in range(12):
        wanted = drawn(tiny_runtime, f"a cat number {number}", seed=100 + number)
        np.testing.assert_array_equal(pixels(folder / f"{number + 1:06d}.png"), wanted)
    assert {path.name for path in folder.iterdir()} == {*images(folder), "index.jsonl"}


def test_two_processes_take_turns(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a\nb\n")
    entered, free = threading.Event(), threading.Event()

    def other() -> None:
        with DrawnImages.open(folder, "png", 5):
            entered.set()
            time.sleep(0.5)
            free.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    ran = cli("generate", tiny_bundle, "--prompts-file", file, "-o", folder, *SMALL, "--json")
    assert free.is_set()
    thread.join()
    assert (ran.code, ran.json["drawn"], ran.json["seed"]) == (0, 2, 5)
    assert f"another process draws into {folder}" in ran.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompts-file", "nothing.txt", "-o", "out"), "no such file"),
        (("--prompts-file", ".", "-o", "out"), "a folder"),
        (("--prompts-file", "x.csv", "-o", "out"), "mv x.csv x.txt"),
        (("--prompts-file", "x.txt", "-o", "out.png"), "-o out --output-format png"),
        (("--prompts-file", "x.txt", "-o", "x.csv"), "the name of a folder"),
        (("--prompts-file", "x.txt", "-o", "out", "--quality", "90"), "the format png has no quality"),
        (("--prompts-file", "x.txt", "-o", "out", "--output-format", "gif"), "invalid choice"),
        (("--prompts-file", "x.txt", "-o", "out", "--height", "99999"), "height is out of range"),
        (("a cat", "--prompts-file", "x.txt", "-o", "out"), "PROMPT too"),
        (("--from-image", "x.png", "--prompts-file", "x.txt", "-o", "out"), "--from-image too"),
        (("a cat", "-o", "x.png", "--batch", "2"), "--prompts-file prompts.txt"),
        (("-o", "x.png"), "there is nothing to draw"),
        (("a cat", "-o", "x.png", "--output-format", "jpg"), "-o x.jpg"),
        (("a cat", "-o", "x.png", "--quality", "5"), "the format png has no quality"),
        (("a cat", "-o", "x.jpg", "--quality", "0"), "not a whole number"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(
    options: tuple[str, ...], words: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.txt", "x.csv"):
        (tmp_path / name).write_text("a cat\n")
    ran = cli("generate", tiny_bundle, *options)
    assert ran.code == 2
    assert words in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.txt"]


def test_the_format_can_be_an_option(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x", "--output-format", "jpg", *SMALL, "--seed", 1).code == 0
    size = (tmp_path / "x.jpg").stat().st_size
    assert cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.jpg", "--quality", 30, *SMALL, "--seed", 1).code == 0
    assert (tmp_path / "x.jpg").stat().st_size < size
    shutil.rmtree(tmp_path)
