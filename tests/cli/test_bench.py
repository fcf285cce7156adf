"""`sana-export bench`: real runs, their reports, and --compare, --profile and --floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_export.bench.run import run_bench
from sana_export.bench.workload import Workload
from tests.support.command_line import Cli


@pytest.mark.slow
def test_a_slowed_graph_is_caught(
    tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three real runs: twice unchanged, then with a denoiser that takes ten times as long, which shows even on a busy machine.

    benchmarks/notes.md has the same on a quiet machine, with a denoiser that does an eighth more work.
    """
    work = Workload("slowed", 128, 128, 4, 4.5, ("a cute 🐼",), repeats=5, threads=1)
    names = ("eager", "tests.support.fake_candidates:slowed")
    for name, times in (("before", "0"), ("again", "0"), ("slowed", "9")):
        monkeypatch.setenv("FAKE_BACKENDS_SLOWER", times)
        run_bench(tiny_bundle, tiny_checkpoint, backends=names, workload=work, output=tmp_path / name)
    files = {name: tmp_path / name / "bench.json" for name in ("before", "again", "slowed")}
    same = cli("bench", "--compare", files["before"], files["again"], "--threshold", "100%")
    assert (same.code, "nothing got worse by more than 100%" in same.out) == (0, True), same.out
    ran = cli("bench", "--compare", files["before"], files["slowed"], "--threshold", "100%", "--json")
    assert ran.code == 5
    worse = {change["stage"] for change in ran.json["changes"] if change["verdict"] == "worse" and change["backend"] != "eager"}
    assert {"denoise_step", "denoise_loop"} <= worse
    assert json.loads(files["slowed"].read_text())["agrees"] is True


@pytest.mark.slow
def test_the_last_line_names_the_report(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path, cli: Cli) -> None:
    workload = tmp_path / "own.toml"
    workload.write_text(
        'height = 64\nwidth = 64\nnum_inference_steps = 1\nguidance_scale = 4.5\nprompts = ["x"]\nrepeats = 1\n'
        "[[sweep]]\nimages_per_prompt = 2\n"
    )
    common = ("bench", tiny_bundle, "--reference", tiny_checkpoint.folder, "--workload", workload, "--prompts", "short,emoji")
    ran = cli(*common, "-o", tmp_path / "out", "--threads", 1)
    assert ran.code == 0, ran.err
    path = Path(ran.out.splitlines()[-1])
    document = json.loads(path.read_text("utf-8"))
    assert path == tmp_path / "out" / "bench.json"
    assert document["workload"]["prompts"][0] == "a red apple"
    assert len(document["workload"]["prompts"]) == 3
    assert document["workload"]["threads"] == 1
    assert [point["images_per_prompt"] for point in document["sweep"]] == [2]
    ran = cli(*common, "-o", tmp_path / "again", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["report"] == str(tmp_path / "again" / "bench.json")
    assert set(ran.json) == {*document, "report"}


def test_a_profile_lists_the_slowest_layers(tiny_bundle: Path, tiny_checkpoint: Any, cli: Cli) -> None:
    common = ("bench", tiny_bundle, "--reference", tiny_checkpoint.folder, "--workload", "smoke", "--profile")
    found = cli(*common, "--graphs", "denoiser", "--json").json
    assert [graph["graph"] for graph in found["graphs"]] == ["denoiser"]
    times = [layer["ms"] for layer in found["graphs"][0]["layers"]]
    assert times == sorted(times, reverse=True)
    ran = cli(*common, "--graphs", "context", "--top", "1")
    assert len([line for line in ran.out.splitlines() if line.startswith("| context")]) == 2
    ran = cli(*common, "--backend", "tensorrt-rtx", "--graphs", "context")
    assert ran.code == 3
    assert "has no engine of context" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "bench needs BUNDLE"),
        (("bundle",), 2, "--reference MODEL"),
        (("--compare", "a.json"), 2, "--compare"),
        (("--compare", "a.json", "b.json"), 4, "a.json cannot be read"),
        (("--compare", "a.json", "b.json", "--threshold", "much"), 2, "is not a percentage"),
        (("--floor", "--profile"), 2, "not allowed with"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], code: int, words: str, cli: Cli) -> None:
    ran = cli("bench", *arguments)
    assert ran.code == code
    assert words in ran.err


def test_a_profile_takes_one_known_backend(tiny_bundle: Path, tiny_checkpoint: Any, cli: Cli) -> None:
    common = ("bench", tiny_bundle, "--reference", tiny_checkpoint.folder, "--workload", "smoke", "--profile")
    assert "one name" in cli(*common, "--backend", "torch", "onnxruntime").err
    assert "--backend torch" in cli(*common, "--backend", "torhc").err
    assert "denoiser" in cli(*common, "--graphs", "transformer").err
