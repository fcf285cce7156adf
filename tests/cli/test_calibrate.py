"""`sana-export calibrate`, and exports that need a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_export.calibration import run
from sana_export.calibration.run import Calibration, calibrate
from sana_export.errors import UsageError
from sana_export.export import bundle
from sana_export.export.bundle import export_bundle
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
    output = tmp_path / "bundle"
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
    assert not [path for path in output.rglob("*") if path.name in (MEASURED, "export.json")]
    again = cli(*command, "--quantize-method", "gptq")
    assert (again.code, "is up to date" in again.err) == (0, True), again.err


def test_a_calibration_of_something_else_is_refused(cli: Cli, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.safetensors"
    assert cli("calibrate", "tiny-random", "-o", path, "--prompts", prompts, *SHORT).code == 0
    export = ["export", "tiny-random", "-o", tmp_path / "bundle", "--calibration", path]
    other = cli(*export, "--quantize", "denoiser=int8", "--dtype", "fp32")
    assert (other.code, "does not cover the denoiser" in other.err) == (2, True), other.err
    half = cli(*export, "--quantize", "text_encoder=int8-weight", "--quantize-method", "gptq")
    assert (half.code, "was measured with another precision" in half.err) == (2, True), half.err
    assert f"measure it again: sana-export calibrate tiny-random -o {path} --dtype fp16 --no-clamp" in half.err
    unused = cli(*export, "--quantize", "vae_decoder=int8-weight", "--dtype", "fp32")
    assert (unused.code, "nothing that is quantized takes a calibration" in unused.err) == (2, True), unused.err
    folder = cli("calibrate", "tiny-random", "-o", tmp_path, *SHORT)
    assert (folder.code, "is a folder" in folder.err) == (2, True), folder.err
    path.write_bytes(b"{}")
    damaged = cli(*export, "--quantize", "denoiser=int8", "--dtype", "fp32")
    assert damaged.code == 4, damaged.err
    assert not (tmp_path / "bundle").exists()


def test_the_text_encoder_is_loaded_once(tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a published text encoder takes as long as two steps."""
    loaded: list[str] = []
    load = run.ObservingBackend.load

    def count(backend: run.ObservingBackend, graph: str) -> Any:
        loaded.append(graph)
        return load(backend, graph)

    monkeypatch.setattr(run.ObservingBackend, "load", count)
    short = Calibration(prompts=["a red apple", "a cat on a wall"], steps=1, size=64, rows=8)
    measured = calibrate(tiny_checkpoint, tmp_path / "measured.safetensors", short, precision="fp32")
    assert set(measured.layers) == {"text_encoder", "denoiser"}
    assert loaded.count("text_encoder") == 1


def test_a_calibration_outlives_a_killed_export(tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrating a published checkpoint takes hours."""
    measured: list[Path] = []
    measure = run._measure

    def count(*arguments: Any) -> None:
        measured.append(arguments[3])
        measure(*arguments)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"precision": "fp32", "graphs": ["text_encoder"], "quantize": ["text_encoder=int8-weight"]}
    options |= {"quantize_method": ["gptq"], "calibration": Calibration(prompts=["a red apple"], rows=16)}
    monkeypatch.setattr(run, "_measure", count)
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "export_graphs", killed)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(tiny_checkpoint, tmp_path / "bundle", **options)
    left = measured[0].parent / "tmp-left"
    left.mkdir()
    export_bundle(tiny_checkpoint, tmp_path / "bundle", **options)
    assert len(measured) == 1
    assert not [*(tmp_path / "bundle").rglob("tmp-*")]


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        (Calibration(prompts="a red apple"), "nothing to calibrate with"),
        (Calibration(prompts=()), "nothing to calibrate with"),
        (Calibration(rows=0), "rows"),
        (Calibration(steps=0), "steps"),
        (Calibration(size=1), "size"),
    ],
)
def test_values_that_do_not_fit_are_refused(tiny_checkpoint: Any, tmp_path: Path, calibration: Calibration, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        calibrate(tiny_checkpoint, tmp_path / "measured.safetensors", calibration)
    for parts in ((), ("vae_decoder",)):
        with pytest.raises(UsageError, match="a graph that calibration does not run"):
            calibrate(tiny_checkpoint, tmp_path / "measured.safetensors", parts=parts)
