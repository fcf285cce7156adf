"""`verify` and `bench` pass their options on and turn a missed limit into an exit code."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sana_export.verify.bundle import Sampling
from sana_export.verify.intervals import Intervals
from sana_export.verify.layers import LayerCheck
from tests.support.command_line import Cli

DEFAULTS = {"backend": "auto", "device": None, "threads": None, "quality": False, "against": None, "intervals": Intervals()}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has one of the name "bundle"."""
    (tmp_path / "bundle").mkdir()
    monkeypatch.chdir(tmp_path)


@dataclass
class Report:
    """A stand-in for both reports."""

    passed: bool = True
    agrees: bool = True
    failed: dict[str, str] = field(default_factory=dict)
    quality: Any = None

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed}

    def as_text(self) -> str:
        return "the report\n"


@dataclass
class Calls:
    """A stand-in for a function that records its calls."""

    report: Report
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __call__(self, *arguments: Any, on_progress: Any, **options: Any) -> Report:
        self.seen.append((arguments, options))
        return self.report


def replaced(monkeypatch: pytest.MonkeyPatch, target: str, **report: Any) -> Calls:
    calls = Calls(Report(**report))
    monkeypatch.setattr(target, calls)
    monkeypatch.setattr("sana_export.bench.report.document.document", Report.as_json)
    monkeypatch.setattr("sana_export.bench.report.text.markdown", Report.as_text)
    return calls


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 5)])
def test_verify(passed: bool, code: int, tiny_checkpoint: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaced(monkeypatch, "sana_export.verify.bundle.verify_bundle", passed=passed)
    options = (
        "--prompt",
        "a cat",
        "a dog",
        "--height",
        64,
        "--width",
        96,
        "--steps",
        3,
        "--guidance-scale",
        1,
        "--seed",
        4,
        "--quality",
        "--guidance-interval",
        0.2,
        0.8,
    )
    ran = cli("verify", "bundle", "--reference", tiny_checkpoint.folder, "--backend", "onnxruntime", *options, "--json")
    assert ran.code == code
    assert ran.json == {"passed": passed}
    ((bundle, checkpoint, sampling), settings) = calls.seen[0]
    assert bundle == Path("bundle")
    assert checkpoint.folder == tiny_checkpoint.folder
    assert sampling == Sampling(prompts=["a cat", "a dog"], height=64, width=96, steps=3, guidance_scale=1.0, seed=4)
    intervals = Intervals(guidance_interval=(0.2, 0.8))
    assert settings == {**DEFAULTS, "backend": "onnxruntime", "quality": True, "intervals": intervals}


def test_verify_leaves_the_defaults_to_the_check(tiny_checkpoint: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaced(monkeypatch, "sana_export.verify.bundle.verify_bundle")
    ran = cli("verify", "bundle", "--reference", tiny_checkpoint.folder)
    ((_, _, sampling), settings) = calls.seen[0]
    assert (ran.code, sampling, settings) == (0, Sampling(), DEFAULTS)


@pytest.mark.parametrize("passed", [True, False])
def test_quality_against_a_bundle_with_a_report(
    passed: bool, tiny_checkpoint: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The page is written even if a limit is missed: it shows why."""
    calls = replaced(monkeypatch, "sana_export.verify.bundle.verify_bundle", passed=passed)
    calls.report.quality = "measured"
    written = []
    monkeypatch.setattr("sana_export.verify.quality.page.page", lambda quality: written.append(quality) or "the page")
    options = ("--quality", "--against", "base", "--report", tmp_path / "new" / "report")
    ran = cli("verify", "bundle", "--reference", tiny_checkpoint.folder, *options)
    page = tmp_path / "new" / "report" / "quality.html"
    assert ran.code == (0 if passed else 5)
    assert ran.out.splitlines() == ["the report", "", str(page)]
    assert (written, page.read_text()) == (["measured"], "the page")
    assert calls.seen[0][1] == {**DEFAULTS, "quality": True, "against": Path("base")}
    ran = cli("verify", "bundle", "--reference", tiny_checkpoint.folder, *options, "--json")
    assert ran.json == {"passed": passed, "report": str(page)}


@pytest.mark.parametrize(("option", "owners"), [("--report", "--quality"), ("--against", "--layers or --quality")])
def test_options_of_quality_belong_to_it(option: str, owners: str, cli: Cli) -> None:
    ran = cli("verify", "bundle", "--reference", "tiny", option, "folder")
    assert ran.code == 2
    assert f"{option} belongs to {owners}" in ran.err
    assert f"fix:    add {owners}" in ran.err
    assert not Path("folder").exists()


def test_a_report_that_cannot_be_written_is_found_before_measuring(tiny_checkpoint: Any, cli: Cli, monkeypatch: Any) -> None:
    calls = replaced(monkeypatch, "sana_export.verify.bundle.verify_bundle")
    Path("file").write_text("")
    ran = cli("verify", "bundle", "--reference", tiny_checkpoint.folder, "--quality", "--report", "file")
    assert (ran.code, calls.seen) == (3, [])
    assert "file cannot be written" in ran.err


@pytest.mark.parametrize("option", ["--guidance-interval", "--pag-interval"])
def test_intervals_belong_to_quality(option: str, cli: Cli) -> None:
    for other in ((), ("--ranges",)):
        ran = cli("verify", "bundle", "--reference", "tiny", option, 0.2, 0.8, *other)
        assert ran.code == 2
        assert f"{option} belongs to --quality" in ran.err
    ran = cli("verify", "bundle", "--reference", "tiny", "--quality", option, 0.8, 0.2)
    assert ran.code == 2
    assert f"fix:    {option} 0.2 0.8" in ran.err


def test_ranges_need_no_reference(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaced(monkeypatch, "sana_export.verify.bundle.measure_ranges")
    ran = cli("verify", "bundle", "--ranges", "--prompt", "a cat", "--steps", 2)
    assert (ran.code, ran.out) == (0, "the report\n")
    assert calls.seen == [((Path("bundle"), Sampling(prompts=["a cat"], steps=2)), {"threads": None})]


def test_layers(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options reach the check, and a tensor that drifts is exit code 5."""
    calls = replaced(monkeypatch, "sana_export.verify.layers.compare_layers", passed=False)
    options = ("--step", 3, "--limit", 40.5, "--against", "good", "--reproducer", "part", "--seed", 7, "--threads", 2)
    ran = cli("verify", "bundle", "--layers", "denoiser", *options, "--random-inputs", "--backend", "tensorrt", "--json")
    assert (ran.code, ran.json) == (5, {"passed": False})
    check = LayerCheck("denoiser", 3, 40.5, True, "tensorrt", Path("good"), Path("part"))
    assert calls.seen == [((Path("bundle"), check, Sampling(seed=7)), {"device": None, "threads": 2})]


def test_files_for_polygraphy(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaced(monkeypatch, "sana_export.verify.polygraphy_files.write_polygraphy_files")
    ran = cli("verify", "bundle", "--polygraphy", "files", "--profile", "laptop", "--prompt", "a cat")
    assert (ran.code, ran.out) == (0, "the report\n")
    settings = {"step": 1, "profile": "laptop", "threads": None}
    assert calls.seen == [((Path("bundle"), Path("files"), Sampling(prompts=["a cat"])), settings)]
    ran = cli("verify", "bundle", "--polygraphy", "files", "--backend", "tensorrt")
    assert ran.code == 2
    assert "leave out --backend" in ran.err


@pytest.mark.parametrize(
    ("options", "owner"),
    [
        (("--step", 2), "--layers or --polygraphy"),
        (("--polygraphy", "files", "--limit", 3), "--layers"),
        (("--layers", "denoiser", "--profile", "laptop"), "--polygraphy"),
    ],
)
def test_options_of_layers_and_polygraphy(options: tuple[Any, ...], owner: str, cli: Cli) -> None:
    ran = cli("verify", "bundle", *options)
    assert ran.code == 2
    assert f"belongs to {owner}\n" in ran.err


def test_ranges_of_a_float32_bundle(tiny_bundle: Path, cli: Cli) -> None:
    ran = cli("verify", tiny_bundle, "--ranges")
    assert ran.code == 2
    assert "--dtype fp16" in ran.err


@pytest.mark.parametrize(
    ("report", "code"),
    [
        ({}, 0),
        ({"agrees": False}, 5),
        ({"failed": {"tensorrt": "no GPU"}}, 3),
        ({"agrees": False, "failed": {"tensorrt": "no GPU"}}, 5),
    ],
)
def test_bench(report: dict[str, Any], code: int, tiny_checkpoint: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaced(monkeypatch, "sana_export.bench.run.run_bench", **report)
    backends = ("--backend", "onnxruntime,trace", "--workload", "smoke", "-o", "report")
    ran = cli("bench", "bundle", "--reference", tiny_checkpoint.folder, *backends)
    assert (ran.code, ran.out) == (code, "the report\n\nreport/bench.json\n")
    assert calls.seen[0][1] == {
        "backends": ("eager", "onnxruntime", "trace"),
        "workload": "smoke",
        "output": Path("report"),
        "device": None,
        "threads": None,
    }


def test_bench_times_onnxruntime_against_eager_by_default(tiny_checkpoint: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaced(monkeypatch, "sana_export.bench.run.run_bench")
    cli("bench", "bundle", "--reference", tiny_checkpoint.folder)
    found = calls.seen[0][1]
    assert (found["backends"], found["workload"], found["output"]) == (("eager", "onnxruntime"), "cpu", Path("benchmarks/out/cpu"))
