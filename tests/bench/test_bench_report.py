from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sana_export.bench.report import Agreement, BackendResult, BenchReport
from sana_export.bench.stages import STAGES, StageResult, Summary
from sana_export.bench.workload import Workload


def stage(median: float, ratio: float | None) -> StageResult:
    ratios = None if ratio is None else Summary(3, ratio, ratio - 0.25, ratio + 0.25)
    return StageResult(Summary(3, median, median - 1, median + 1), 2 * median, ratios)


def report(psnr_db: float = math.inf, other_load: float | None = 0.04) -> BenchReport:
    backends = (
        BackendResult("eager", "the reference", None, 2.0, 3 << 20, None, {"end_to_end": stage(30.0, None)}),
        BackendResult("fast", "ours", None, 1.0, 2 << 20, 5 << 20, {"end_to_end": stage(20.0, 1.5)}, Agreement(psnr_db, 60.0)),
        BackendResult("broken", "", "it fell\n  over"),
    )
    return BenchReport(
        created="2030-01-02T03:04:05+00:00",
        machine={"cpu": "a cpu", "cores": 2, "memory": 8 << 30, "gpu": [], "os": "Linux", "python": "3.11.7"},
        versions={"sana_export": "0.1.0"},
        bundle={
            "source": "tiny-random",
            "synthetic": True,
            "precision": "fp32",
            "clamp": False,
            "pag_layers": [1],
            "export_key": "ab",
        },
        workload=Workload("smoke", 128, 128, 2, 4.5, ("a 🐼",)),
        threads=2,
        other_load=other_load,
        backends={result.name: result for result in backends},
    )


def test_json_holds_every_backend_and_stage() -> None:
    document = json.loads(json.dumps(report(71.5).as_json(), allow_nan=False))
    assert set(document) == {
        *("schema_version", "created", "machine", "versions", "bundle", "workload", "other_load", "noisy"),
        *("baseline", "agrees", "backends"),
    }
    assert document["schema_version"] == 1
    assert document["workload"]["prompts"] == ["a 🐼"]
    assert document["workload"]["threads"] == 2
    fast = document["backends"]["fast"]
    assert list(fast["stages"]) == list(STAGES)
    assert fast["stages"]["context"] is None
    assert fast["stages"]["end_to_end"] == {
        "n": 3,
        "median_ms": 20.0,
        "p10_ms": 19.0,
        "p90_ms": 21.0,
        "first_ms": 40.0,
        "ratio_to_eager": {"n": 3, "median": 1.5, "p10": 1.25, "p90": 1.75},
    }
    assert fast["peak_memory"] == {"rss_bytes": 2 << 20, "device_bytes": 5 << 20}
    assert fast["agreement"] == {"psnr_db": 71.5, "limit_db": 60.0, "agrees": True}
    assert fast["speedup"] == 1.5
    assert document["backends"]["eager"]["agreement"] is None
    assert document["backends"]["broken"]["failed"] == "it fell\n  over"


@pytest.mark.parametrize(
    ("psnr_db", "agrees", "written"), [(math.inf, True, "inf"), (59.9, False, 59.9), (-math.inf, False, "-inf")]
)
def test_a_wrong_answer_has_no_speed(psnr_db: float, agrees: bool, written: object) -> None:
    found = report(psnr_db)
    assert found.agrees is agrees
    assert found.backends["fast"].speedup == (1.5 if agrees else None)
    assert found.as_json()["backends"]["fast"]["agreement"] == {"psnr_db": written, "limit_db": 60.0, "agrees": agrees}
    assert ("DOES NOT AGREE" in found.as_text()) is not agrees


def test_text_is_a_table_with_the_failures_below() -> None:
    lines = report(71.5).as_text().splitlines()
    rows = [line for line in lines if line.startswith("| end_to_end")]
    assert rows == [
        "| end_to_end | eager | 3 | 30.0 | 29.0 to 31.0 | 60.0 |  |",
        "| end_to_end | fast | 3 | 20.0 | 19.0 to 21.0 | 40.0 | 1.50 (1.25 to 1.75) |",
    ]
    assert "- broken: FAILED: it fell over" in lines
    assert any("peak memory 2 MiB, peak device memory 5 MiB, image 71.5 dB" in line for line in lines)
    assert report().failed == {"broken": "it fell\n  over"}


@pytest.mark.parametrize(("other_load", "noisy"), [(None, False), (0.1, False), (0.11, True)])
def test_a_busy_machine_is_told(other_load: float | None, noisy: bool) -> None:
    found = report(other_load=other_load)
    assert (found.as_json()["noisy"], found.as_json()["other_load"]) == (noisy, other_load)
    assert ("- other processes used 11% of the cores meanwhile: NOISY" in found.as_text()) is noisy
    assert ("other processes" in found.as_text()) is (other_load is not None)


def test_write_leaves_two_whole_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    paths = report().write(folder)
    assert sorted(folder.iterdir()) == sorted(paths) == [folder / "bench.json", folder / "bench.md"]
    assert json.loads(paths[0].read_text("utf-8")) == report().as_json()
    assert paths[1].read_text("utf-8") == report().as_text()
