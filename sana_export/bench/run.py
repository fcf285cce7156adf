"""A benchmark from start to end: load every backend in its own process, take turns, compare, report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.bench.candidates.table import ALL, BASELINE, Job, check_names, find_row
from sana_export.bench.candidates.worker import Worker, WorkerFailed
from sana_export.bench.gpu_watch import GpuWatch
from sana_export.bench.load_meter import LoadMeter
from sana_export.bench.report.result import Agreement, BackendResult, BenchReport, SweepPoint
from sana_export.bench.stages import Call, stage_results
from sana_export.bench.work.ceiling import better
from sana_export.bench.work.count import Rates
from sana_export.bench.work.workload import workload_work
from sana_export.bench.workload import Workload, load_workload
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.errors import UsageError
from sana_export.export.parity import IMAGE_PSNR_LIMITS, psnr
from sana_export.files import disk_errors
from sana_export.formats.arrays import Array
from sana_export.machine import describe_machine, describe_versions
from sana_export.manifest import Manifest

log = logging.getLogger(__name__)

#: Threads of a library spin for a moment after its work: that long the next backend waits for its turn.
_SETTLE_SECONDS = 0.05

#: Called with what is about to be done, the count of things done and of all.
OnProgress = Callable[[str, int, int], None]


@dataclass
class Runner:
    """One backend while it is timed: its process, its answers when it was loaded and to its last call, its calls, its images.

    `failed`: why it failed; `unfit`: it said itself that something is not here.
    """

    name: str
    worker: Worker | None = None
    loaded: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    images: Array | None = None
    failed: str | None = None
    unfit: bool = False


@dataclass
class Steps:
    """Counts the things that are done, for whoever watches."""

    total: int
    tell: OnProgress
    done: int = 0

    def next(self, doing: str) -> None:
        self.tell(doing, self.done, self.total)
        self.done += 1


@dataclass(frozen=True)
class Measured:
    """The runners with all their calls; `other_load`: the share of the cores that other processes used during the rounds."""

    runners: list[Runner]
    other_load: float | None
    watch: GpuWatch


def run_bench(
    bundle: Path,
    checkpoint: SanaCheckpoint,
    *,
    backends: Sequence[str] = (BASELINE, "onnxruntime"),
    workload: str | Path | Workload = "cpu",
    output: Path | None = None,
    device: int | None = None,
    threads: int | None = None,
    on_progress: OnProgress = lambda doing, done, total: None,
) -> BenchReport:
    """Time `backends` (names of `candidates.ROWS`, or "all") on `bundle` and on the checkpoint that it was exported from.

    A round is one call of each backend in turn for each prompt, with the same seed, so that whatever else the machine does falls
    on all alike; ratios are taken pair by pair. The machine's ceiling is measured before and after. A backend that fails is
    reported as failed, one that "all" named and that says what it lacks as skipped, and the others go on. `output` is a folder for
    the report. `device` is the index of the GPU, for a workload on "cuda". `threads` replaces the workload's number.

    Raises UsageError for an unknown backend or workload or a device that the workload does not use, ArtifactError for a bundle that
    cannot be read, DependencyError where `output` cannot be written.
    """
    names = check_names(backends)
    asked = {BASELINE, *(name for name in backends if name != ALL)}
    work = workload if isinstance(workload, Workload) else load_workload(workload)
    work = work if threads is None else dataclasses.replace(work, threads=threads)
    if device is not None and work.device == "cpu":
        raise UsageError(
            f"the workload {work.name} runs on the CPU",
            found=f"GPU {device}",
            wanted='a workload with device = "cuda", or no GPU',
            fix="leave out --device",
        )
    manifest = Manifest.load(bundle)
    if output is not None:
        with disk_errors(output):  # before the minutes, not after them
            output.mkdir(parents=True, exist_ok=True)
    amounts = workload_work(bundle, manifest, checkpoint, work)
    runs = [_jobs(names, bundle, checkpoint, manifest, point, device) for point in (work, *work.points())]
    steps = Steps(sum(len(jobs) + jobs[0].workload.warmup + jobs[0].workload.repeats for jobs in runs if jobs) + 2, on_progress)
    before = _rates(runs[0][0], steps)
    measured = _measure(runs[0], asked, steps)
    rates = better(before, _rates(runs[0][0], steps))
    usable = {runner.name for runner in measured.runners if runner.failed is None and not find_row(runner.name).fixed_shapes}
    sweep = [_point(jobs, usable, steps) for jobs in runs[1:]]
    on_progress("report", steps.total, steps.total)
    report = BenchReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=describe_versions(),
        bundle={
            "source": manifest.checkpoint.source,
            "synthetic": manifest.checkpoint.synthetic,
            "precision": manifest.options.precision,
            "clamp": manifest.options.clamp,
            "pag_layers": list(manifest.options.pag_layers),
            "export_key": manifest.export_key,
        },
        workload=work,
        threads=work.resolved_threads(),
        other_load=measured.other_load,
        backends=_results(measured, work),
        rates=rates,
        work=amounts,
        sweep=sweep,
        images={runner.name: runner.images for runner in measured.runners if runner.images is not None},
    )
    if output is not None:
        with disk_errors(output):
            report.write(output)
    return report


def _jobs(
    names: Sequence[str], bundle: Path, checkpoint: SanaCheckpoint, manifest: Manifest, work: Workload, device: int | None
) -> list[Job]:
    return [_job(name, bundle, checkpoint, manifest, work, device) for name in names]


def _rates(job: Job, steps: Steps) -> Rates | None:
    """The ceiling, measured in a process of its own; None where that fails, with the reason in the log."""
    steps.next("ceiling")
    precision = "fp32" if job.workload.device == "cpu" else ("bf16" if job.precision == "fp32" else job.precision)
    try:
        with Worker(job) as worker:
            return worker.rates(precision)
    except WorkerFailed as error:
        log.warning("the machine's ceiling could not be measured: %s", error)
        return None


def _point(jobs: Sequence[Job], usable: set[str], steps: Steps) -> SweepPoint:
    """One point of the sweep, with those backends that the workload itself ran on."""
    kept = [job for job in jobs if job.backend in usable]
    steps.done += len(jobs) - len(kept)
    work = jobs[0].workload
    if not kept:
        steps.done += work.warmup + work.repeats
        return SweepPoint(work, {})
    return SweepPoint(work, _results(_measure(kept, set(), steps), work))


def _job(name: str, bundle: Path, checkpoint: SanaCheckpoint, manifest: Manifest, work: Workload, device: int | None = None) -> Job:
    return Job(
        backend=name,
        bundle=str(bundle.resolve()),
        checkpoint=str(checkpoint.folder.resolve()),
        weights_variant=checkpoint.weights_variant,
        precision=manifest.options.precision,
        clamp=manifest.options.clamp,
        pag_layers=manifest.options.pag_layers,
        threads=work.resolved_threads(),
        workload=dataclasses.replace(work, sweep=()),
        transformer=None if checkpoint.transformer_file is None else str(checkpoint.transformer_file.resolve()),
        loras=tuple((str(lora.path.resolve()), lora.scale) for lora in checkpoint.loras),
        device=device,
    )


def _measure(jobs: Sequence[Job], asked: set[str], steps: Steps) -> Measured:
    """Load every job's backend and make all rounds. One that fails is no failure of the run unless it was `asked` for."""
    work, watch = jobs[0].workload, GpuWatch()
    with contextlib.ExitStack() as stack:
        images = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sana-export-bench-"))) / "images.npy"
        runners = []
        for job in jobs:
            steps.next(f"loading {job.backend}")
            runners.append(_start(job, stack, asked=job.backend in asked))
        meter = LoadMeter(lambda: sum((runner.last or runner.loaded).get("cpu_seconds", 0.0) for runner in runners))
        for number in range(work.warmup + work.repeats):
            steps.next(f"round {number + 1} of {work.warmup + work.repeats}, {work.height}x{work.width}")
            for index in range(len(work.prompts)):
                _take_turns(runners, number, index, work, images, watch)
        return Measured(runners, meter.other_load(), watch)


def _start(job: Job, stack: contextlib.ExitStack, *, asked: bool) -> Runner:
    """Prepare and load a backend in its process, which `stack` ends."""
    runner, row = Runner(job.backend), find_row(job.backend)
    if not asked and row.slow_on_cpu and job.workload.device == "cpu":
        runner.failed, runner.unfit = row.slow_on_cpu, True
        return runner
    try:
        if row.prepare is not None:
            with Worker(job) as preparing:
                preparing.prepare()
        runner.worker = stack.enter_context(Worker(job))
        runner.loaded = runner.worker.load()
    except WorkerFailed as error:
        runner.unfit = error.unfit and not asked
        _fail(runner, error)
    return runner


def _fail(runner: Runner, error: WorkerFailed) -> None:
    log.log(logging.INFO if runner.unfit else logging.WARNING, "%s failed: %s", runner.name, error)
    runner.failed = str(error)


def _ready(runners: Sequence[Runner]) -> Iterator[tuple[Runner, Worker]]:
    return ((runner, runner.worker) for runner in runners if runner.worker is not None and runner.failed is None)


def _take_turns(runners: Sequence[Runner], number: int, index: int, work: Workload, images: Path, watch: GpuWatch) -> None:
    """One call of every backend, one after the other; the baseline comes first, and its images are the reference of the others."""
    reference: Array | None = None
    for runner, worker in _ready(runners):
        time.sleep(_SETTLE_SECONDS)
        try:
            with watch.turn(runner.name, worker.process):
                answer = worker.call(work.prompts[index], work.seed, images)
        except WorkerFailed as error:
            _fail(runner, error)
            continue
        found = np.load(images)
        runner.last = answer
        runner.calls.append(Call(number, index, answer["times"], None if reference is None else _likeness(found, reference)))
        if index == 0:
            runner.images = found
        if runner.name == BASELINE:
            reference = found


def _likeness(images: Array, reference: Array) -> float:
    """PSNR in dB over all images of a call."""
    return psnr(images, reference, peak=255.0) if images.shape == reference.shape else float("-inf")


def _results(measured: Measured, work: Workload) -> dict[str, BackendResult]:
    baseline = next((runner for runner in measured.runners if runner.name == BASELINE and runner.failed is None), None)
    return {runner.name: _result(runner, baseline, work.warmup, measured.watch) for runner in measured.runners}


def _result(runner: Runner, baseline: Runner | None, warmup: int, watch: GpuWatch) -> BackendResult:
    """What `runner` has shown, against `baseline` unless that is None (absent, or it failed)."""
    description = runner.loaded.get("description", "")
    other = None if runner is baseline else baseline
    if runner.failed is not None:
        return BackendResult(runner.name, description, runner.failed, skipped=runner.unfit)
    gpu = watch.summary(runner.name)
    return BackendResult(
        runner.name,
        description,
        None,
        runner.loaded["load_seconds"],
        runner.last["peak_rss_bytes"],
        runner.last["peak_device_bytes"] or (gpu or {}).get("process_bytes"),
        stages=stage_results(runner.calls[0], _counted(runner, warmup), None if other is None else _counted(other, warmup)),
        agreement=None if other is None else _agreement(runner, other),
        work=find_row(runner.name).work,
        gpu=gpu,
    )


def _counted(runner: Runner, warmup: int) -> list[Call]:
    return [call for call in runner.calls if call.round >= warmup]


def _agreement(runner: Runner, baseline: Runner) -> Agreement:
    limit = min(IMAGE_PSNR_LIMITS[side.loaded["precision"]] for side in (runner, baseline))
    return Agreement(min(call.psnr_db for call in runner.calls if call.psnr_db is not None), limit)
