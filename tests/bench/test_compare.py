"""Made-up reports of both kinds, and two real ones of gpu-check. tests/cli/test_bench.py compares real reports of bench."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sana_export.bench.report.compare import Comparison, compare, compare_files
from sana_export.bench.report.timed_run import run_of
from sana_export.errors import ArtifactError, UsageError


def stage(median: float, spread: float, ratio: float | None) -> dict[str, Any]:
    ratios = None if ratio is None else {"n": 5, "median": ratio, "p10": ratio, "p90": ratio}
    return {"n": 5, "median_ms": median, "p10_ms": median - spread, "p90_ms": median + spread, "ratio_to_eager": ratios}


def report(ours: float, *, eager: float = 200.0, spread: float = 2.0) -> dict[str, Any]:
    """A report with these times in ms, and at another size four times as much."""
    backends = {"eager": (eager, None), "ours": (ours, eager / ours)}
    whole = {name: {"end_to_end": stage(ms, spread, ratio), "context": None} for name, (ms, ratio) in backends.items()}
    return {
        "schema_version": 2,
        "machine": {"cpu": "a cpu"},
        "versions": {"torch": "1"},
        "bundle": {"export_key": "x"},
        "workload": {"name": "w", "height": 512, "repeats": 5},
        "noisy": False,
        "noise": [],
        "baseline": "eager",
        "backends": {
            name: {"failed": None, "skipped": None, "agreement": None, "stages": stages} for name, stages in whole.items()
        },
        "sweep": [
            {
                "height": 1024,
                "width": 1024,
                "images_per_prompt": 1,
                "backends": {name: {"end_to_end": stage(4 * ms, spread, ratio)} for name, (ms, ratio) in backends.items()},
            }
        ],
    }


def compared(before: dict[str, Any], after: dict[str, Any], threshold: float = 0.05) -> Comparison:
    return compare(run_of(before, Path("a")), run_of(after, Path("b")), threshold)


def verdicts(before: dict[str, Any], after: dict[str, Any], threshold: float = 0.05) -> set[str]:
    found = compared(before, after, threshold)
    return {change.verdict for change in found.changes if change.backend == "ours"}


def test_worse_and_better_beyond_threshold_and_spread() -> None:
    assert verdicts(report(100), report(120)) == {"worse"}
    assert verdicts(report(120), report(100)) == {"better"}
    assert verdicts(report(100), report(104)) == {""}
    assert verdicts(report(100), report(120), threshold=0.25) == {""}
    # Within the spread of the two runs. At the larger size the difference exceeds it, because the times are longer.
    assert verdicts(report(100, spread=15), report(120, spread=15)) == {"", "worse"}


def test_if_eager_slows_down_as_much_it_was_the_machine() -> None:
    assert verdicts(report(100, eager=200), report(150, eager=300)) == {""}
    assert verdicts(report(100, eager=200), report(150, eager=210)) == {"worse"}
    # A slower eager is not a regression.
    found = compared(report(100, eager=200), report(100, eager=400))
    assert [change.verdict for change in found.changes if change.backend == "eager"] == ["worse", "worse"]
    assert found.passed


def test_a_lost_backend_is_a_regression() -> None:
    for change, reason in (
        (lambda backends: backends.pop("ours"), "not in the second report"),
        (lambda backends: backends["ours"].update(failed="no  GPU"), "no GPU"),
        (lambda backends: backends["ours"].update(agreement={"agrees": False, "psnr_db": 12.0}), "its images no longer agree"),
    ):
        after = copy.deepcopy(report(100))
        change(after["backends"])
        found = compared(report(100), after)
        assert not found.passed
        assert reason in found.lost["ours"]
        assert reason in found.as_text()


def test_other_differences_are_reported() -> None:
    after = report(100)
    after["versions"] = {"torch": "2", "triton": "3"}
    after["noisy"], after["noise"] = True, ["others used 50%"]
    text = compared(report(100), after).as_text()
    for line in ("versions torch: 1 to 2", "versions triton: None to 3", "the second run was noisy (others used 50%)"):
        assert f"- different: {line}" in text
    after["workload"]["height"] = 1024
    with pytest.raises(UsageError, match="cannot be compared"):
        compared(report(100), after)
    more = report(100)
    more["workload"]["repeats"] = 9
    assert compared(report(100), more).passed


def gpu_check(ours: float, *, eager: float | None = 800.0, card: str = "NVIDIA A, 580.1", **more: Any) -> dict[str, Any]:
    """A report with these times of 1600M's loop in ms, at batch 4 three times as much."""

    def part(loop: float) -> dict[str, Any]:
        def row(ms: float) -> dict[str, Any]:
            times = {"n": 4, "median": ms, "p10": ms - 1, "p90": ms + 1}
            return {"denoise_loop": times, "vae_decoder": None, "end_to_end": {**times, "median": ms + 50, "p90": ms + 51}}

        return {"status": "passed", "reason": None, "found": {"rows": {"1": row(loop), "4": row(3 * loop)}}}

    found = {
        "compute_capability": "9.0",
        "modules": {"torch": {"version": "2.11.0+cu130"}, "onnxruntime": {"error": "it does not load"}},
        "gpu_state": [{"power.limit": "700.00 W", "temperature.gpu": "30"}],
    }
    parts = {"find": {"status": "passed", "reason": None, "found": found}, "latency/1600m/torch": part(ours), "tests": None}
    if eager is not None:
        parts["latency/1600m/eager"] = part(eager)
    return {
        "schema_version": 1,
        "device": "cuda",
        "machine": {"cpu": "a cpu", "gpu": [card]},
        "versions": {"torch": "2.11.0", "onnxruntime": "1.31"},
        "parts": parts,
        **more,
    }


def test_the_rows_of_gpu_check_are_the_stages() -> None:
    found = compared(gpu_check(400), gpu_check(800))
    changes = {(change.backend, change.stage): change for change in found.changes}
    stages = [f"1600m, batch {batch}, {stage}" for batch in (1, 4) for stage in ("denoise_loop", "end_to_end")]
    assert set(changes) == {(backend, stage) for backend in ("torch", "eager") for stage in stages}
    loop = changes["torch", "1600m, batch 4, denoise_loop"]
    assert (loop.before_ms, loop.after_ms, loop.before_spread_ms, loop.verdict) == (1200, 2400, (1199, 1201), "worse")
    assert (loop.before_ratio, loop.after_ratio) == (2.0, 1.0)
    assert changes["eager", "1600m, batch 4, denoise_loop"].before_ratio is None
    assert not found.passed
    assert "| 1600m, batch 1, denoise_loop | torch | 400.0 (399.0 to 401.0) | 800.0 (799.0 to 801.0) | +100.0% |" in found.as_text()


def test_a_slower_card_is_not_our_regression() -> None:
    """Eager slows down as much. Without eager, only the times can tell."""
    assert verdicts_of_torch(gpu_check(400), gpu_check(800, eager=1600)) == {""}
    assert verdicts_of_torch(gpu_check(400, eager=None), gpu_check(800, eager=None)) == {"worse"}


def verdicts_of_torch(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    stages = [change for change in compared(before, after).changes if change.backend == "torch"]
    return {change.verdict for change in stages if change.stage.endswith("denoise_loop")}


def test_what_differs_between_two_cards() -> None:
    after = gpu_check(400, card="NVIDIA B, 590.2")
    state = after["parts"]["find"]["found"]
    state["compute_capability"], state["gpu_state"] = "12.0", [{"power.limit": "300.00 W", "temperature.gpu": "60"}]
    state["modules"] = {"torch": {"version": "2.12.0+cu130"}, "onnxruntime": {"version": "1.32"}}
    after["parts"]["latency/1600m/torch"]["found"]["rows"]["4"]["gpu"] = {"slowed_by": ["power cap"]}
    found = compared(gpu_check(400), after)
    assert found.differs == (
        "machine gpu: ['NVIDIA A, 580.1'] to ['NVIDIA B, 590.2']",
        "versions torch: 2.11.0+cu130 to 2.12.0+cu130",
        "versions onnxruntime: 1.31 to 1.32",
        "compute capability: 9.0 to 12.0",
        "GPU 0 power.limit: 700.00 W to 300.00 W",
        "the second run was slowed down by: power cap (torch, 1600m, batch 4)",
    )
    assert found.passed


def test_a_part_that_no_longer_gives_times_is_lost() -> None:
    after = gpu_check(400)
    after["parts"]["latency/1600m/torch"].update(status="failed", reason="the images differ\nfrom eager's")
    found = compared(gpu_check(400), after)
    assert found.lost == {"1600m/torch": "the images differ from eager's"}
    assert not found.passed
    assert not compared(after, gpu_check(400)).lost
    assert compared(gpu_check(400), gpu_check(400, eager=None)).lost == {"1600m/eager": "not in the second report"}


def test_reports_of_different_kinds_and_devices_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="different kinds") as mixed:
        compared(report(100), gpu_check(100))
    assert mixed.value.found == "a, made by sana-export bench, and b, made by make gpu-check"
    with pytest.raises(UsageError, match="different workloads") as other:
        compared(gpu_check(100), gpu_check(100, device="cpu"))
    assert other.value.found == "device 'cuda' in a, 'cpu' in b"


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_committed_reports_of_a_gpu() -> None:
    """The first one is of an older state of gpu-check, whose entries lack some keys."""
    first, second = RESULTS / "h200-gpu-check-1.json", RESULTS / "h200-gpu-check-2.json"
    found = compare_files(first, second, 0.05)
    loops = {
        (change.backend, change.stage): (change.before_ratio or 0.0, change.after_ratio or 0.0)
        for change in found.changes
        if change.stage.endswith("denoise_loop")
    }
    assert set(loops) == {
        ("eager", "1600m, batch 1, denoise_loop"),
        ("eager", "1600m, batch 4, denoise_loop"),
        ("torch-compile", "1600m, batch 1, denoise_loop"),
    }
    assert loops["torch-compile", "1600m, batch 1, denoise_loop"] == pytest.approx((1.860, 1.875), abs=1e-3)
    assert found.lost == {"1600m/torch": "not in the second report"}
    assert compare_files(second, first, 0.05).lost == {
        "1600m/torch-compile": "out of time: ended after 68 s, but it may take 120 s"
    }


OTHER_FILES = {
    "{": "cannot be read",
    "[]": "is not a report",
    '{"tests": {}, "machine": {}}': "is not a report",
    '{"schema_version": 1, "backends": {}}': "is not a report of this version",
    '{"schema_version": 2, "backends": {}}': "is damaged",
    '{"schema_version": 9, "parts": {}}': "is not a report of this version",
    '{"schema_version": 1, "parts": {}}': "is damaged",
    '{"schema_version": 1, "device": "cuda", "machine": {}, "versions": {}, "parts": {"latency/x": {}}}': "is damaged",
    '{"schema_version": 1, "device": "cuda", "parts": [1]}': "is damaged",
}


@pytest.mark.parametrize("content", OTHER_FILES)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=OTHER_FILES[content]):
        compare_files(path, path, 0.05)
    with pytest.raises(ArtifactError, match="cannot be read"):
        compare_files(tmp_path / "none.json", path, 0.05)
