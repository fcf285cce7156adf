"""Where output goes and where caches are: `~`, `.`, mounted disks, users without a home, systems other than Linux."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_export import SanaRuntime
from sana_export.checkpoint.checkpoint import EMBEDDED
from sana_export.errors import DependencyError, UsageError
from sana_export.manifest import FILE_NAME, Manifest
from sana_export.user_paths import user_path
from tests.support.command_line import Cli, command

#: An export of a graph without weights, which takes a second.
QUICK = ("--graphs", "sampler", "-q")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that a container made up."""

    def missing(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "SANA_EXPORT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", missing)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_tilde_is_the_home_folder(
    home: Path, tiny_bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home.mkdir()
    assert cli("export", "tiny", "--output=~/b", *QUICK).code == 0
    assert (home / "b" / FILE_NAME).is_file()
    assert cli("inspect", "~/b").code == 0
    shutil.copytree(tiny_bundle, home / "bundle")
    assert cli("generate", "~/bundle", "a fox", "--output=~/pictures/a.png", "--steps", 1, "-q").code == 0
    assert (home / "pictures" / "a.png").is_file()
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "tiny"\noutput = "~/out"\ngraphs = ["sampler"]\n')
    assert cli("engines", recipe, "-q").code == 0
    assert (home / "out" / FILE_NAME).is_file()
    shutil.copytree(EMBEDDED / "tiny", home / "tiny")
    recipe.write_text('model = "~/tiny"\noutput = "~/out2"\ngraphs = ["sampler"]\n')
    assert cli("engines", recipe, "-q").code == 0
    assert Manifest.load(home / "out2").checkpoint.source == str(home / "tiny")
    with SanaRuntime.from_pretrained("~/bundle", backend="onnxruntime") as runtime, pytest.raises(UsageError) as caught:
        runtime.load_lora("~/nothing.safetensors")
    assert str(home / "nothing.safetensors") in str(caught.value)
    assert entries(tmp_path) == {"home", "r.toml"}


@pytest.mark.parametrize("name", ["~other/x", "a/~", "./~", "~x"])
def test_a_tilde_elsewhere_is_a_name(home: Path, name: str) -> None:
    assert user_path(name) == Path(name)


@pytest.mark.parametrize("value", ["", " ", "a\0b", b"x", None, 3, "\udcff"])
def test_what_is_not_a_path(value: Any) -> None:
    with pytest.raises(UsageError, match="the bundle is not"):
        SanaRuntime.from_pretrained(value)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("export", "tiny", "-o", ""), 2, "--output is not a path"),
        (("export", "tiny", "-o", "/"), 2, "holds something that is not a bundle"),
        (("export", "tiny", "-o", "file"), 2, "holds something that is not a bundle"),
        (("export", "tiny", "-o", "file/b"), 3, "cannot be written"),
        (("export", "tiny", "-o", "full"), 2, "holds something that is not a bundle"),
        (("synth", "tiny-random", "-o", ""), 2, "--output is not a path"),
        (("synth", "tiny-random", "-o", "/"), 2, "is not a synthetic checkpoint"),
        (("generate", "", "x", "-o", "a.png"), 2, "BUNDLE is not a path"),
        (("generate", "b", "x", "-o", ""), 2, "--output is not a path"),
        (("generate", "b", "x", "-o", "/"), 2, "not the name of an image file"),
        (("generate", "b", "x", "-o", "file/a.png"), 3, "cannot be written"),
        (("inspect", ""), 2, "BUNDLE is not a path"),
        (("engines", ""), 2, "RECIPE.toml is not a path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_places_that_are_refused(
    arguments: tuple[str, ...], code: int, words: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    ran = cli(*arguments)
    assert (ran.code, words in ran.err) == (code, True), ran.err
    assert entries(tmp_path) == {"file", "full"}
    assert entries(tmp_path / "full") == {"thesis.txt"}


def current(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    return "."


def mounted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    is_mount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder or is_mount(path))
    return str(folder)


def in_a_locked_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent and access(path, mode))
    return str(folder)


@pytest.mark.parametrize("make", [current, mounted, in_a_locked_parent])
def test_a_folder_that_cannot_be_renamed_is_filled(
    make: Callable[[Path, pytest.MonkeyPatch], str], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    before = folder.stat().st_ino
    output = make(folder, monkeypatch)
    for precision in ("fp32", "fp16", "fp16"):
        ran = cli("export", "tiny", "-o", output, "--dtype", precision, *QUICK)
        assert ran.code == 0, ran.err
        assert Manifest.load(folder).options.precision == precision
    assert entries(folder) == {FILE_NAME, "onnx", "tokenizer", "instruction.safetensors", "embeddings.safetensors"}
    assert entries(tmp_path) == {"out"}
    assert folder.stat().st_ino == before


def test_a_synthetic_checkpoint_in_the_current_folder(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        assert cli("synth", "tiny-random", "-o", ".", "--seed", seed, "-q").code == 0
    assert not [name for name in entries(tmp_path) if name.startswith(".")]
    assert (tmp_path / "model_index.json").is_file()


def test_the_target_of_a_link_is_filled(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert cli("export", "tiny", "-o", tmp_path / "link", *QUICK).code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / FILE_NAME).is_file()


@pytest.mark.parametrize("name", ["SANA_EXPORT_CACHE", "XDG_CACHE_HOME"])
def test_a_user_without_a_home_sets_a_variable(
    no_home: None, name: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("export", "tiny-random", "-o", "b", *QUICK)
    assert ran.code == 3
    assert "export SANA_EXPORT_CACHE=" in ran.err
    assert entries(tmp_path) == set()
    monkeypatch.setenv(name, str(tmp_path / "cache"))
    assert cli("export", "tiny-random", "-o", "b", *QUICK).code == 0
    assert entries(tmp_path) == {"b", "cache"}


def test_a_user_without_a_home_exports_and_samples(no_home: None, tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("export", "tiny", "-o", tmp_path / "b", *QUICK).code == 0
    assert cli("generate", tiny_bundle, "a fox", "-o", tmp_path / "a.png", "--steps", 1, "-q").code == 0


@pytest.mark.parametrize("arguments", [("export", "owner/model", "-o", "b"), ("export", "tiny", "-o", "~/b")])
def test_what_needs_a_home_names_the_variable(
    no_home: None, arguments: tuple[str, ...], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    ran = cli(*arguments, "--offline")
    assert (ran.code, "HF_HOME" in ran.err or "HOME=" in ran.err) == (3, True), ran.err
    assert entries(tmp_path) == set()
    with pytest.raises(DependencyError):
        user_path("~/x")


def test_onnxruntime_records_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    """Where it cannot keep its records, it would say so on stderr."""
    environment = {**os.environ, "HOME": "/proc", "XDG_CACHE_HOME": "/proc"}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    program = f"from sana_export import SanaRuntime\nSanaRuntime.from_pretrained({str(tiny_bundle)!r}, backend='onnxruntime')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "elemetry" not in done.stderr


def test_a_folder_whose_name_is_not_utf8(tiny_bundle: Path, tmp_path: Path) -> None:
    """It may be the current folder; as an argument it is refused before any work."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(folder)).mkdir()
    run = {"cwd": folder, "capture_output": True, "text": True}
    assert subprocess.run(command("generate", tiny_bundle, "x", "-o", "a.png", "--steps", 1), **run).returncode == 0  # type: ignore[call-overload]
    assert entries(Path(os.fsdecode(folder))) == {"a.png"}
    for arguments in (
        ("export", "tiny", "-o", folder + b"/b"),
        ("generate", folder, "x", "-o", "a.png"),
        ("export", folder, "-o", "b"),
    ):
        done = subprocess.run([*command(), *arguments], **run)  # type: ignore[call-overload]
        assert (done.returncode, "an argument is not UTF-8 text" in done.stderr) == (2, True)
        assert "caf\\udce9" in done.stderr
    assert entries(Path(os.fsdecode(folder))) == {"a.png"}


def test_a_system_that_lacks_what_windows_lacks(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [
        ["export", "tiny", "-o", "b", *QUICK],
        ["generate", str(tiny_bundle), "a fox", "-o", "a.png", "--steps", "1"],
        ["inspect", str(tiny_bundle)],
        ["doctor"],
    ]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.as_on_windows", json.dumps(lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert entries(tmp_path) == {"b", "a.png"}


LONG = "x" * 256


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", LONG),
        ("verify", LONG, "--reference", "tiny"),
        ("build", LONG, "--backend", "tensorrt-rtx"),
        ("export", "tiny", "-o", LONG),
        ("export", LONG, "-o", "b"),
        ("export", f"~/{LONG}", "-o", "b"),
        ("export", "tiny-random", "--vae", LONG, "-o", "b"),
        ("synth", "tiny-random", "-o", LONG),
        ("engines", LONG),
        ("generate", "BUNDLE", "a fox", "-o", f"{LONG}.png"),
        ("generate", "BUNDLE", "a fox", "a cat", "-o", f"{'x' * 250}.png"),
        ("generate", "/x" * 3000, "a fox", "-o", "a.png"),
    ],
    ids=lambda arguments: " ".join(arguments)[:20],
)
def test_names_that_are_too_long(
    arguments: tuple[str, ...], tiny_bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli(*(str(tiny_bundle) if word == "BUNDLE" else word for word in arguments))
    assert (ran.code, "too long" in ran.err) == (2, True), ran.err
    assert entries(tmp_path) == set()


def test_the_longest_name_is_written(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / f"{'é' * 125}.png"
    assert cli("generate", tiny_bundle, "a fox", "-o", output, "--steps", 1).code == 0
    assert entries(tmp_path) == {output.name}


def test_the_home_folder_of_another_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user = pwd.getpwuid(os.getuid())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path(f"~{user.pw_name}/a.png") == Path(user.pw_dir) / "a.png"
    assert user_path("~nobody-of-that-name/a.png") == Path("~nobody-of-that-name/a.png")


def test_an_empty_home_is_not_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(DependencyError, match="home folder of this user is not known"):
        user_path("~/a.png")


def test_a_bundle_that_is_missing_leaves_no_folder(tmp_path: Path, cli: Cli) -> None:
    assert cli("generate", tmp_path / "b", "a fox", "-o", tmp_path / "new" / "a.png").code == 4
    assert entries(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "fix"), [("dir.png", "dir.png/image.png"), ("my dir", "'my dir/image.png'"), ("a b.gif", "'a b.png'")]
)
def test_an_output_that_is_no_image_file(
    name: str, fix: str, tiny_bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not name.endswith(".gif"):
        (tmp_path / name).mkdir()
    ran = cli("generate", tiny_bundle, "a fox", "-o", name)
    assert (ran.code, f"-o {fix}" in ran.err) == (2, True), ran.err


def test_one_of_several_outputs_is_a_folder(tiny_bundle: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a-1.png").mkdir()
    ran = cli("generate", tiny_bundle, "a fox", "a cat", "-o", tmp_path / "a.png")
    assert (ran.code, "a-1.png is a folder" in ran.err) == (2, True), ran.err
    assert entries(tmp_path) == {"a-1.png"}


def test_an_output_that_is_a_link_to_itself(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "b").symlink_to("b")
    ran = cli("export", "tiny", "-o", tmp_path / "b", *QUICK)
    assert (ran.code, "leads in a circle" in ran.err) == (2, True), ran.err
    assert entries(tmp_path) == {"b"}
