"""Two made-up reports. tests/cli/test_bench.py compares real ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sana_export.bench.report.compare import compare, compare_files
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


def verdicts(before: dict[str, Any], after: dict[str, Any], threshold: float = 0.05) -> set[str]:
    found = compare(before, after, threshold, "a", "b")
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
    found = compare(report(100, eager=200), report(100, eager=400), 0.05, "a", "b")
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
        found = compare(report(100), after, 0.05, "a", "b")
        assert not found.passed
        assert reason in found.lost["ours"]
        assert reason in found.as_text()


def test_other_differences_are_reported() -> None:
    after = report(100)
    after["versions"] = {"torch": "2", "triton": "3"}
    after["noisy"], after["noise"] = True, ["others used 50%"]
    text = compare(report(100), after, 0.05, "a", "b").as_text()
    for line in ("versions torch: 1 to 2", "versions triton: None to 3", "the second run was noisy (others used 50%)"):
        assert f"- different: {line}" in text
    after["workload"]["height"] = 1024
    with pytest.raises(UsageError, match="cannot be compared"):
        compare(report(100), after, 0.05, "a", "b")
    more = report(100)
    more["workload"]["repeats"] = 9
    assert compare(report(100), more, 0.05, "a", "b").passed


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 1, "backends": {}}', '{"schema_version": 2}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(ArtifactError):
        compare_files(path, path, 0.05)
    with pytest.raises(ArtifactError):
        compare_files(tmp_path / "none.json", path, 0.05)
