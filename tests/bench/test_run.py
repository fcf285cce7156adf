from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_export.bench import load_meter, rounds, run
from sana_export.bench.candidates import table as candidates
from sana_export.bench.candidates.table import Job, Row, check_names
from sana_export.bench.candidates.worker import Worker, WorkerFailed, WorkerServer
from sana_export.bench.report.document import document
from sana_export.bench.report.result import BenchReport
from sana_export.bench.report.text import markdown
from sana_export.bench.run import run_bench
from sana_export.bench.stages import STAGES
from sana_export.bench.workload import Workload
from sana_export.errors import DependencyError, UsageError
from sana_export.export.parity import psnr
from sana_export.progress import Progress

WORK = Workload("test", 96, 128, 2, 4.5, ("a cute 🐼",), seed=5, repeats=3)
FAILING = (
    "tests.support.fake_candidates:cannot_load",
    "tests.support.fake_candidates:raises_later",
    "tests.support.fake_candidates:is_killed_later",
    "tests.support.fake_candidates:exits",
)


@pytest.fixture
def no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose ceiling takes no time. test_ceiling.py measures it, and so does the run of `report`."""
    monkeypatch.setattr(Worker, "rates", lambda worker, precision: None)


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> BenchReport:
    """Eager, ours, ours with another seed, and four that fail."""
    names = ("onnxruntime", "eager", "tests.support.fake_candidates:other_seed", *FAILING)
    output = tmp_path_factory.mktemp("bench") / "report"
    found = run_bench(tiny_bundle, tiny_checkpoint, backends=names, workload=WORK, output=output)
    assert json.loads((output / "bench.json").read_text("utf-8")) == document(found)
    assert (output / "bench.md").read_text("utf-8") == markdown(found)
    return found


def test_every_stage_is_timed(report: BenchReport) -> None:
    eager, ours = report.backends["eager"], report.backends["onnxruntime"]
    assert next(iter(report.backends)) == "eager"
    assert set(ours.stages) == set(STAGES)
    assert set(STAGES) - set(eager.stages) == {"context"}
    for result in (eager, ours):
        assert {stage: found.ms.n for stage, found in result.stages.items()} == {
            stage: WORK.repeats * (WORK.num_inference_steps if stage == "denoise_step" else 1) for stage in result.stages
        }
        parts = sum(result.stages[stage].ms.p10 for stage in result.stages if stage not in ("denoise_step", "end_to_end"))
        assert parts <= result.stages["end_to_end"].ms.p90
        assert result.peak_rss_bytes is not None
        assert result.peak_rss_bytes > 50 << 20
    assert eager.description == "diffusers SanaPipeline, eager, float32 on the cpu"
    assert ours.description == "SanaRuntime, fp32, onnxruntime on the cpu"


def test_ratios_fit_the_medians(report: BenchReport) -> None:
    eager, ours = report.backends["eager"], report.backends["onnxruntime"]
    assert all(found.ratio is None for found in eager.stages.values())
    for stage, found in ours.stages.items():
        if stage == "context":
            assert found.ratio is None
            continue
        assert found.ratio is not None
        assert found.ratio.n == WORK.repeats
        theirs = eager.stages[stage].ms
        assert theirs.p10 / found.ms.p90 * 0.5 <= found.ratio.median <= theirs.p90 / found.ms.p10 * 2
    assert ours.speedup == ours.stages["end_to_end"].ratio.median  # type: ignore[union-attr]


def test_images_that_differ_from_the_baselines_do_not_agree(report: BenchReport, tiny_pipeline: Any, tiny_runtime: Any) -> None:
    ours, other = report.backends["onnxruntime"].agreement, report.backends["tests.support.fake_candidates:other_seed"].agreement
    assert ours is not None
    assert other is not None
    assert ours.agrees
    assert not other.agrees
    assert not report.agrees
    assert report.backends["tests.support.fake_candidates:other_seed"].speedup is None
    # The PSNR is that of the real images.
    settings = {"num_inference_steps": 2, "height": 96, "width": 128, "use_resolution_binning": False}
    generator = torch.Generator().manual_seed(WORK.seed)
    wanted = np.stack(tiny_pipeline(WORK.prompts[0], generator=generator, **settings).images)
    found = np.stack(tiny_runtime(WORK.prompts[0], seed=WORK.seed + 1, **settings).images)
    assert other.psnr_db == pytest.approx(psnr(found, wanted, peak=255.0), abs=0.2)
    assert 3 < other.psnr_db < 30


def test_failures_are_reported_and_the_rest_goes_on(report: BenchReport) -> None:
    reasons = [report.failed.pop(name) for name in FAILING]
    assert reasons[0] == "FileNotFoundError: no weights for the fake"
    assert reasons[1] == "ValueError: the second call is too much"
    assert reasons[2] == "its process ended: killed by SIGKILL; about to die"
    assert reasons[3] == "its process ended: exit code 1; the library gave up"
    assert set(report.failed) == set(FAILING)
    assert all(not report.backends[name].stages for name in FAILING)


def test_pag_agrees_with_the_pag_pipeline(tiny_bundle: Path, tiny_checkpoint: Any, no_ceiling: None) -> None:
    work = Workload("pag", 64, 96, 2, 4.5, ("a cute 🐼",), pag_scale=2.0, repeats=1, threads=2)
    found = run_bench(tiny_bundle, tiny_checkpoint, workload=work, threads=1)
    assert found.threads == found.workload.threads == 1
    assert "SanaPAGPipeline" in found.backends["eager"].description
    assert found.failed == {}
    assert found.backends["onnxruntime"].agreement is not None
    assert found.agrees


def test_backends_take_turns(
    tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ceiling: None
) -> None:
    monkeypatch.setenv("FAKE_BACKENDS_LOG", str(tmp_path / "turns"))
    work = Workload("turns", 64, 64, 1, 1.0, ("x", "y"), warmup=1, repeats=2)
    steps: list[Progress] = []
    found = run_bench(
        tiny_bundle,
        tiny_checkpoint,
        backends=("tests.support.fake_candidates:notes_turns", "tests.support.fake_candidates:notes_turns_too"),
        workload=work,
        on_progress=steps.append,
    )
    assert (tmp_path / "turns").read_text().split() == [f"{name}{index}" for index in range(6) for name in "ab"]
    result = found.backends["tests.support.fake_candidates:notes_turns"]
    assert result.agreement is None
    assert result.stages["denoise_step"].ratio is None
    assert (result.stages["end_to_end"].ms.n, result.stages["denoise_step"].ms.n) == (4, 12)
    assert (result.stages["denoise_step"].ms.median, result.stages["denoise_loop"].ms.median) == (2.0, 12.0)
    assert found.other_load is not None
    assert 0 <= found.other_load <= 1
    assert [step.done for step in steps] == list(range(8))
    assert {step.total for step in steps} == {7}
    assert [step.doing for step in (steps[0], steps[-2], steps[-1])] == ["ceiling", "ceiling", "report"]


def test_the_load_of_others_leaves_out_what_the_run_itself_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, own, now = [1000.0], [300.0], [50.0]
    monkeypatch.setattr(load_meter, "busy_seconds", lambda: busy[0])
    monkeypatch.setattr(load_meter.time, "monotonic", lambda: now[0])
    meter = load_meter.LoadMeter(lambda: own[0])
    # Over 100 seconds of every core, all processes together worked for 40 s and ours for 30 s of these.
    busy[0], own[0], now[0] = 1040.0, 330.0, 150.0
    assert meter.other_load() == pytest.approx(10.0 / (100.0 * (os.cpu_count() or 1)), abs=0.01)
    monkeypatch.setattr(load_meter, "busy_seconds", lambda: None)
    assert meter.other_load() is None


def test_all_leaves_out_what_cannot_run_and_says_why(
    tiny_bundle: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, no_ceiling: None
) -> None:
    """A row that lacks something is skipped under `all` and fails if it was named; one that crashes fails in both cases."""
    rows = {
        "eager": Row("tests.support.fake_candidates:notes_turns"),
        "lacking": Row("tests.support.fake_candidates:lacks_a_package"),
        "broken": Row("tests.support.fake_candidates:cannot_load"),
        "slow": Row("tests.support.fake_candidates:notes_turns", slow_on_cpu="takes minutes"),
    }
    monkeypatch.setattr(candidates, "ROWS", rows)
    monkeypatch.setattr(Worker, "load", in_this_process)
    work = Workload("all", 64, 64, 1, 1.0, ("x",), repeats=1)
    found = run_bench(tiny_bundle, tiny_checkpoint, backends=("all",), workload=work)
    assert found.skipped["slow"] == "takes minutes"
    assert "no such package" in found.skipped["lacking"]
    assert set(found.failed) == {"broken", "eager"}
    found = run_bench(tiny_bundle, tiny_checkpoint, backends=("all", "lacking"), workload=work)
    assert set(found.failed) == {"broken", "eager", "lacking"}


def in_this_process(worker: Worker) -> dict[str, Any]:
    """`Worker.load` without its process, which would know only the real rows. Nothing is loaded."""
    answer = WorkerServer().answer({"load": worker.job.as_json()})
    if "failed" in answer:
        raise WorkerFailed(answer["failed"], unfit=answer["unfit"])
    raise WorkerFailed("loaded, but not here")


@pytest.mark.slow
def test_a_point_of_the_sweep_is_a_run_of_its_own(tiny_bundle: Path, tiny_checkpoint: Any) -> None:
    sweep = ({"height": 96}, {"images_per_prompt": 3})
    work = Workload("sweep", 64, 64, 1, 4.5, ("x",), repeats=2, sweep=sweep)
    found = run_bench(tiny_bundle, tiny_checkpoint, workload=work)
    higher, more = found.sweep
    assert (higher.workload.height, more.workload.images_per_prompt) == (96, 3)
    for point in found.sweep:
        assert set(point.backends) == {"eager", "onnxruntime"}
        agreement = point.backends["onnxruntime"].agreement
        assert agreement is not None
        assert agreement.agrees
        assert point.backends["onnxruntime"].speedup is not None
    assert found.images["eager"].shape == (1, 64, 64, 3)
    # The achieved rates are the counted work divided by the measured time.
    ours, step = found.achieved("onnxruntime", "denoise_step"), found.backends["onnxruntime"].stages["denoise_step"]
    assert ours is not None
    assert ours.tflops == pytest.approx(found.work["bundle"]["denoise_step"].flop / step.ms.median / 1e9)
    assert ours.share == pytest.approx(ours.floor_ms / step.ms.median)
    assert 0 < ours.share < 1.5


def test_no_process_is_left_when_the_run_is_interrupted(
    tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ceiling: None
) -> None:
    monkeypatch.setenv("FAKE_BACKENDS_LOG", str(tmp_path / "turns"))
    started: list[Worker] = []

    class Watched(Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            started.append(self)

    def interrupt(progress: Progress) -> None:
        if progress.doing.startswith("round 2"):
            raise KeyboardInterrupt

    for module in (run, rounds):
        monkeypatch.setattr(module, "Worker", Watched)
    with pytest.raises(KeyboardInterrupt):
        run_bench(
            tiny_bundle,
            tiny_checkpoint,
            backends=("tests.support.fake_candidates:notes_turns",),
            workload=WORK,
            on_progress=interrupt,
        )
    assert [worker.process.poll() is not None for worker in started] == [True, True]  # the first measured the ceiling


def test_unknown_names_and_folders_are_refused_before_anything_starts(
    tiny_bundle: Path, tiny_checkpoint: Any, sprint_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, rounds):
        monkeypatch.setattr(module, "Worker", None)
    with pytest.raises(UsageError) as error:
        run_bench(tiny_bundle, tiny_checkpoint, backends=("eager", "onnxruntme"))
    assert error.value.fix == "--backend onnxruntime"
    with pytest.raises(UsageError, match="unknown workload 'cqu'"):
        run_bench(tiny_bundle, tiny_checkpoint, workload="cqu")
    with pytest.raises(UsageError, match="the workload cpu runs on the CPU"):
        run_bench(tiny_bundle, tiny_checkpoint, device=1)
    with pytest.raises(UsageError, match="was not exported from") as error:
        run_bench(tiny_bundle, sprint_checkpoint, output=tmp_path / "report")
    assert str(error.value.fix).startswith(f"sana-export bench {tiny_bundle} --reference ")
    assert not (tmp_path / "report").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DependencyError):
        run_bench(tiny_bundle, tiny_checkpoint, output=tmp_path / "file" / "report")


def test_the_baseline_goes_first_and_names_count_once() -> None:
    assert check_names(["onnxruntime", "trace", "eager", "onnxruntime"]) == ("eager", "onnxruntime", "trace")
    with pytest.raises(UsageError):
        check_names([])
