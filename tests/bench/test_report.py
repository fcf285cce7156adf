from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from sana_export.bench.report.document import document
from sana_export.bench.report.result import Agreement, BackendResult, BenchReport, SweepPoint
from sana_export.bench.report.text import markdown
from sana_export.bench.report.write import write_report
from sana_export.bench.stages import STAGES, StageResult, Summary
from sana_export.bench.work.count import Product, Rates, Work
from sana_export.bench.workload import Workload

GPU = {
    "power_w": {"median": 300.0, "min": 250.0, "max": 320.0},
    **dict.fromkeys(("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "process_bytes")),
    "slowed_by": ["power cap"],
}


def stage(median: float, ratio: float | None) -> StageResult:
    ratios = None if ratio is None else Summary(3, ratio, ratio - 0.25, ratio + 0.25)
    return StageResult(Summary(3, median, median - 1, median + 1), 2 * median, ratios)


def report(psnr_db: float = math.inf, other_load: float | None = 0.04) -> BenchReport:
    backends = (
        BackendResult("eager", "the reference", None, 2.0, 3 << 20, None, {"end_to_end": stage(30.0, None)}),
        BackendResult(
            *("fast", "ours", None, 1.0, 2 << 20, 5 << 20, {"end_to_end": stage(20.0, 1.5)}, Agreement(psnr_db, 60.0)),
            work="bundle",
            gpu=GPU,
        ),
        BackendResult("broken", "", "it fell\n  over"),
        BackendResult("elsewhere", "", "no GPU", skipped=True),
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
        rates=Rates(1e12, 1e9, "fp32", "made up"),
        work={"bundle": {"end_to_end": Work.of([Product("", "MatMul", 3 * 10**9, 5 * 10**6)])}},
    )


def test_json_holds_every_backend_and_stage() -> None:
    found = json.loads(json.dumps(document(report(71.5)), allow_nan=False))
    assert set(found) == {
        *("schema_version", "created", "machine", "versions", "bundle", "workload", "other_load", "noisy", "noise"),
        *("baseline", "agrees", "ceiling", "work", "backends", "sweep"),
    }
    assert found["schema_version"] == 2
    assert found["workload"]["prompts"] == ["a 🐼"]
    assert found["workload"]["threads"] == 2
    fast = found["backends"]["fast"]
    assert list(fast["stages"]) == list(STAGES)
    assert fast["stages"]["context"] is None
    assert fast["stages"]["end_to_end"] == {
        "n": 3,
        "median_ms": 20.0,
        "p10_ms": 19.0,
        "p90_ms": 21.0,
        "first_ms": 40.0,
        "ratio_to_eager": {"n": 3, "median": 1.5, "p10": 1.25, "p90": 1.75},
        # 3e9 FLOP and 5e6 bytes in 20 ms, and the ceiling is 1e12 FLOP and 1e9 bytes a second: the bytes take 5 ms.
        "achieved": pytest.approx({"tflops": 0.15, "gbs": 0.25, "floor_ms": 5.0, "share": 0.25}),
    }
    assert found["ceiling"] == {"matmul_tflops": 1.0, "copy_gbs": 1.0, "precision": "fp32", "source": "made up"}
    assert found["work"] == {"bundle": {"end_to_end": {"flop": 3e9, "bytes": 5e6, "floor_ms": 5.0}}}
    assert fast["peak_memory"] == {"rss_bytes": 2 << 20, "device_bytes": 5 << 20}
    assert fast["agreement"] == {"psnr_db": 71.5, "limit_db": 60.0, "agrees": True}
    assert fast["speedup"] == 1.5
    assert found["backends"]["eager"]["agreement"] is None
    assert found["backends"]["broken"]["failed"] == "it fell\n  over"


@pytest.mark.parametrize(
    ("psnr_db", "agrees", "written"), [(math.inf, True, "inf"), (59.9, False, 59.9), (-math.inf, False, "-inf")]
)
def test_a_wrong_answer_has_no_speed(psnr_db: float, agrees: bool, written: object) -> None:
    found = report(psnr_db)
    assert found.agrees is agrees
    assert found.backends["fast"].speedup == (1.5 if agrees else None)
    assert document(found)["backends"]["fast"]["agreement"] == {"psnr_db": written, "limit_db": 60.0, "agrees": agrees}
    assert ("DOES NOT AGREE" in markdown(found)) is not agrees


def test_text_is_a_table_with_the_failures_below() -> None:
    lines = markdown(report(71.5)).splitlines()
    rows = [line for line in lines if line.startswith("| end_to_end")]
    assert rows == [
        "| end_to_end | eager | 3 | 30.0 | 29.0 to 31.0 | 60.0 |  |  |  |  |",
        "| end_to_end | fast | 3 | 20.0 | 19.0 to 21.0 | 40.0 | 1.50 (1.25 to 1.75) | 0.15 | 0.25 | 25% |",
    ]
    assert "- broken: FAILED: it fell over" in lines
    assert any(
        "peak memory 2 MiB, peak device memory 5 MiB, 300 W (250 to 320), slowed by power cap, image 71.5 dB" in line
        for line in lines
    )
    assert "- elsewhere: skipped: no GPU" in lines
    assert any("floor of the whole call with the work of our graphs: 5.0 ms, 0.003 TFLOP" in line for line in lines)
    assert "image identical" in markdown(report())
    assert (report().failed, report().skipped) == ({"broken": "it fell\n  over"}, {"elsewhere": "no GPU"})


def test_work_is_that_of_one_call_of_one_prompt() -> None:
    """The report counts one call for each prompt."""
    found = report(71.5)
    two = dataclasses.replace(found, workload=dataclasses.replace(found.workload, prompts=("a 🐼", "a 🎋")))
    assert document(two)["work"] == {"bundle": {"end_to_end": {"flop": 1.5e9, "bytes": 2.5e6, "floor_ms": 2.5}}}
    assert document(two)["backends"]["fast"]["stages"]["end_to_end"]["achieved"]["share"] == pytest.approx(2.5 / 20)


def test_other_sizes_have_their_own_table() -> None:
    found = report(71.5)
    larger = dataclasses.replace(found.workload, height=256, images_per_prompt=2)
    swept = dataclasses.replace(found, sweep=(SweepPoint(larger, found.backends),))
    rows = [line for line in markdown(swept).splitlines() if line.startswith("| 256x128")]
    assert rows == [
        "| 256x128 | 2 | eager | 3 | 30.0 | 29.0 to 31.0 |  | 3 |",
        "| 256x128 | 2 | fast | 3 | 20.0 | 19.0 to 21.0 | 1.50 | 5 |",
        "| 256x128 | 2 | broken |  | it fell over |  |  |  |",
        "| 256x128 | 2 | elsewhere |  | no GPU |  |  |  |",
    ]
    (point,) = document(swept)["sweep"]
    assert (point["height"], point["width"], point["images_per_prompt"]) == (256, 128, 2)
    assert point["backends"]["fast"]["end_to_end"]["median_ms"] == 20.0


@pytest.mark.parametrize(("other_load", "noisy"), [(None, False), (0.1, False), (0.11, True)])
def test_a_busy_machine_is_reported(other_load: float | None, noisy: bool) -> None:
    found = report(other_load=other_load)
    assert (document(found)["noisy"], document(found)["other_load"]) == (noisy, other_load)
    assert ("NOISY, the times are unreliable: other processes used 11% of the cores" in markdown(found)) is noisy
    assert ("other processes" in markdown(found)) is (other_load is not None)


def test_a_wide_spread_is_noise_too() -> None:
    wide = StageResult(Summary(5, 20.0, 15.0, 20.1), 1.0, None)
    found = report()
    backends = {**found.backends, "fast": dataclasses.replace(found.backends["fast"], stages={"end_to_end": wide})}
    assert found.noise == []
    assert dataclasses.replace(found, backends=backends).noise == ["the end-to-end times of fast span 26% of their median"]


def test_write_report_leaves_no_partial_file(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    paths = write_report(report(), folder)
    assert sorted(path for path in folder.iterdir() if path.is_file()) == sorted(paths[:3])
    assert [path.name for path in paths[:3]] == ["bench.json", "bench.md", "bench.html"]
    assert json.loads(paths[0].read_text("utf-8")) == document(report())
    assert paths[1].read_text("utf-8") == markdown(report())
