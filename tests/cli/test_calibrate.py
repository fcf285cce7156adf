"""`sana-export calibrate`, and exports that need a calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_export.export.quantize.statistics import MEASURED, CalibrationFile
from tests.support.command_line import Cli

PROMPTS = "a red apple\n\na cat on a wall\n"
#: A short calibration.
SHORT = ("--graphs", "text_encoder", "--rows", "64", "--dtype", "fp32")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


def test_calibrate_writes_what_layers_read(cli: Cli, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.safetensors"
    ran = cli("calibrate", "tiny-random", "-o", path, "--prompts", prompts, *SHORT, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["prompts"] == ["a red apple", "a cat on a wall"]
    assert (ran.json["steps"], ran.json["layers"], ran.json["parts"]) == (0, 15, ["text_encoder"])
    measured = CalibrationFile(path)
    qkv = measured.inputs("text_encoder", "layers.0.qkv.weight")
    gate, up = (measured.inputs("text_encoder", f"layers.0.{name}.weight") for name in ("gate", "up"))
    assert qkv is not None
    assert gate is not None
    assert up is not None
    assert gate.index == up.index != qkv.index
    assert qkv.rows.shape[1] == len(qkv.maximum) == 64
    assert (abs(qkv.rows).max(axis=0) <= qkv.maximum).all()
    assert measured.inputs("text_encoder", "layers.0.input_norm.weight") is None
    assert sorted(path.parent.iterdir()) == [path]
    first = path.read_bytes()
    assert cli("calibrate", "tiny-random", "-o", path, "--prompts", prompts, *SHORT).code == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--graphs", "denoiser,context"], ["a graph that calibration does not run", "context"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt cannot be read"]),
        (["--prompts", "EMPTY"], ["is empty", "one prompt a line"]),
        (["--rows", "0"], ["--rows"]),
    ],
)
def test_wrong_arguments_write_nothing(cli: Cli, tmp_path: Path, arguments: list[str], texts: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    empty = tmp_path / "empty" / "prompts.txt"
    empty.write_text("\n \n")
    given = [str(empty) if word == "EMPTY" else word for word in arguments]
    ran = cli("calibrate", "tiny-random", "-o", tmp_path / "measured.safetensors", *given)
    assert ran.code == 2
    assert all(text in ran.err for text in texts), ran.err
    assert not (tmp_path / "measured.safetensors").exists()


def test_an_export_measures_what_it_needs_and_leaves_no_trace(cli: Cli, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    command = [
        "export",
        "tiny-random",
        "-o",
        bundle,
        "--dtype",
        "fp32",
        "--graphs",
        "text_encoder",
        "--quantize",
        "text_encoder=int4-weight",
    ]
    ran = cli(*command, "--quantize-method", "gptq", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["options"]["quantize_method"] == ["gptq"]
    assert len(ran.json["options"]["calibration"]) == 64
    assert not [path for path in bundle.rglob("*") if path.name in (MEASURED, "export.json")]
    again = cli(*command, "--quantize-method", "gptq")
    assert (again.code, "is up to date" in again.err) == (0, True), again.err


def test_a_calibration_of_something_else_is_refused(cli: Cli, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.safetensors"
    assert cli("calibrate", "tiny-random", "-o", path, "--prompts", prompts, *SHORT).code == 0
    export = ["export", "tiny-random", "-o", tmp_path / "bundle", "--calibration", path]
    other = cli(*export, "--quantize", "denoiser=int8", "--dtype", "fp32")
    assert (other.code, "was measured with another part" in other.err) == (2, True), other.err
    half = cli(*export, "--quantize", "text_encoder=int8-weight", "--quantize-method", "gptq")
    assert (half.code, "was measured with another precision" in half.err) == (2, True), half.err
    assert f"fix:    sana-export calibrate tiny-random -o {path} --dtype fp16" in half.err
    path.write_bytes(b"{}")
    damaged = cli(*export, "--quantize", "denoiser=int8", "--dtype", "fp32")
    assert damaged.code == 4, damaged.err
    assert not (tmp_path / "bundle").exists()
