"""A whole benchmark: load each backend in its own process, call them in turn, compare, report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from sana_export.bench.report.write import write_report
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
from sana_export.progress import OnProgress, Progress, ignore_progress

log = logging.getLogger(__name__)

#: Pause between two turns. A library's threads keep spinning for a moment after their work.
_PAUSE_SECONDS = 0.05


@dataclass
class BenchRunner:
    """One backend while it is timed."""

    #: Its name in the table of candidates.
    name: str
    #: Its process. None if it could not be started.
    worker: Worker | None = None
    #: The worker's answer to `load`.
    loaded: Mapping[str, Any] = field(default_factory=dict)
    #: The worker's answer to the last call.
    last: Mapping[str, Any] = field(default_factory=dict)
    #: All its calls.
    calls: list[Call] = field(default_factory=list)
    #: Its last images of the first prompt.
    images: Array | None = None
    #: Why it failed, or None.
    failed: str | None = None
    #: Whether `failed` only says that it cannot run on this machine.
    unfit: bool = False


@dataclass
class Steps:
    """Counts the steps of a run and reports each."""

    #: Number of all steps.
    total: int
    #: Called before each step and at the end.
    on_progress: OnProgress
    #: Number of finished steps.
    done: int = 0

    def next(self, doing: str) -> None:
        self.on_progress(Progress(doing, self.done, self.total))
        self.done += 1


@dataclass(frozen=True)
class Measured:
    """The rounds of one workload."""

    #: The backends with all their calls.
    runners: list[BenchRunner]
    #: The share of the cores' time that other processes used during the rounds. None if it is not known.
    other_load: float | None
    #: What the GPU reported during the turns.
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
    on_progress: OnProgress = ignore_progress,
) -> BenchReport:
    """Time `backends` on `bundle` and on the checkpoint that it was exported from.

    A round is one call of each backend in turn for each prompt, with the same seed, so that other load on the machine affects all
    of them alike. Ratios are taken pair by pair. The machine's ceiling is measured before and after the rounds. If a backend fails,
    the report says why and the others go on.

    backends: names of `candidates.table.ROWS`, "module:function", or "all". A backend that only "all" named and that cannot run on
        this machine is skipped.
    workload: a built-in workload's name, the path of a TOML file, or a `Workload`.
    output: a folder for the report. None writes nothing.
    device: index of the GPU. None means the first one.
    threads: number of CPU threads, in place of the workload's.

    Raises UsageError for an unknown backend or workload or a `device` for a workload on the CPU, ArtifactError if the bundle cannot
    be read, DependencyError if `output` cannot be written.
    """
    names = check_names(backends)
    named = {BASELINE, *(name for name in backends if name != ALL)}
    work = workload if isinstance(workload, Workload) else load_workload(workload)
    if threads is not None:
        work = dataclasses.replace(work, threads=threads)
    if device is not None and work.device == "cpu":
        raise UsageError(
            f"the workload {work.name} runs on the CPU",
            found=f"device {device}",
            wanted="no device, or a workload on a GPU",
            fix="--workload laptop",
        )
    manifest = Manifest.load(bundle)
    if output is not None:
        with disk_errors(output):  # now, not after minutes of measuring
            output.mkdir(parents=True, exist_ok=True)
    amounts = workload_work(bundle, manifest, checkpoint, work)
    runs = [[_job(name, bundle, checkpoint, manifest, point, device) for name in names] for point in (work, *work.points())]
    steps = Steps(sum(len(jobs) + jobs[0].workload.warmup + jobs[0].workload.repeats for jobs in runs if jobs) + 2, on_progress)
    before = _rates(runs[0][0], steps)
    measured = _measure(runs[0], named, steps)
    rates = better(before, _rates(runs[0][0], steps))
    usable = {runner.name for runner in measured.runners if runner.failed is None and not find_row(runner.name).fixed_shapes}
    sweep = [_point(jobs, usable, steps) for jobs in runs[1:]]
    on_progress(Progress("report", steps.total, steps.total))
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
            write_report(report, output)
    return report


def _rates(job: Job, steps: Steps) -> Rates | None:
    """The ceiling, measured in its own process. None, with a warning, if that fails."""
    steps.next("ceiling")
    precision = "fp32" if job.workload.device == "cpu" else ("bf16" if job.precision == "fp32" else job.precision)
    try:
        with Worker(job) as worker:
            return worker.rates(precision)
    except WorkerFailed as error:
        log.warning("the machine's ceiling could not be measured: %s", error)
        return None


def _point(jobs: Sequence[Job], usable: set[str], steps: Steps) -> SweepPoint:
    """Measure one point of the sweep, with the backends that ran the workload itself."""
    kept = [job for job in jobs if job.backend in usable]
    steps.done += len(jobs) - len(kept)
    work = jobs[0].workload
    if not kept:
        steps.done += work.warmup + work.repeats
        return SweepPoint(work, {})
    return SweepPoint(work, _results(_measure(kept, set(), steps), work))


def _job(name: str, bundle: Path, checkpoint: SanaCheckpoint, manifest: Manifest, work: Workload, device: int | None) -> Job:
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


def _measure(jobs: Sequence[Job], named: set[str], steps: Steps) -> Measured:
    """Load each job's backend and make all rounds. A backend that is not in `named` may be unfit for this machine."""
    work, watch = jobs[0].workload, GpuWatch(index=jobs[0].device or 0)
    with contextlib.ExitStack() as stack:
        images = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sana-export-bench-"))) / "images.npy"
        runners = []
        for job in jobs:
            steps.next(f"loading {job.backend}")
            runners.append(_start(job, stack, named=job.backend in named))
        meter = LoadMeter(lambda: sum((runner.last or runner.loaded).get("cpu_seconds", 0.0) for runner in runners))
        for number in range(work.warmup + work.repeats):
            steps.next(f"round {number + 1} of {work.warmup + work.repeats}, {work.height}x{work.width}")
            for index in range(len(work.prompts)):
                _take_turns(runners, number, index, work, images, watch)
        return Measured(runners, meter.other_load(), watch)


def _start(job: Job, stack: contextlib.ExitStack, *, named: bool) -> BenchRunner:
    """Prepare a backend and load it in its process, which `stack` ends."""
    runner, row = BenchRunner(job.backend), find_row(job.backend)
    if not named and row.slow_on_cpu and job.workload.device == "cpu":
        runner.failed, runner.unfit = row.slow_on_cpu, True
        return runner
    try:
        if row.prepare is not None:
            with Worker(job) as preparing:
                preparing.prepare()
        runner.worker = stack.enter_context(Worker(job))
        runner.loaded = runner.worker.load()
    except WorkerFailed as error:
        runner.unfit = error.unfit and not named
        _fail(runner, error)
    return runner


def _fail(runner: BenchRunner, error: WorkerFailed) -> None:
    log.log(logging.INFO if runner.unfit else logging.WARNING, "%s failed: %s", runner.name, error)
    runner.failed = str(error)


def _ready(runners: Sequence[BenchRunner]) -> Iterator[tuple[BenchRunner, Worker]]:
    return ((runner, runner.worker) for runner in runners if runner.worker is not None and runner.failed is None)


def _take_turns(runners: Sequence[BenchRunner], number: int, index: int, work: Workload, images: Path, watch: GpuWatch) -> None:
    """Call each backend once. The baseline comes first; the others' images are compared with its images."""
    reference: Array | None = None
    for runner, worker in _ready(runners):
        time.sleep(_PAUSE_SECONDS)
        try:
            with watch.turn(runner.name, worker.process.pid):
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
    """PSNR in dB over all images of a call. Minus infinity if their shapes differ."""
    return psnr(images, reference, peak=255.0) if images.shape == reference.shape else float("-inf")


def _results(measured: Measured, work: Workload) -> dict[str, BackendResult]:
    baseline = next((runner for runner in measured.runners if runner.name == BASELINE and runner.failed is None), None)
    return {runner.name: _result(runner, baseline, work.warmup, measured.watch) for runner in measured.runners}


def _result(runner: BenchRunner, baseline: BenchRunner | None, warmup: int, watch: GpuWatch) -> BackendResult:
    """The result of `runner`, compared with `baseline` unless that is None (absent or failed)."""
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


def _counted(runner: BenchRunner, warmup: int) -> list[Call]:
    return [call for call in runner.calls if call.round >= warmup]


def _agreement(runner: BenchRunner, baseline: BenchRunner) -> Agreement:
    limit = min(IMAGE_PSNR_LIMITS[side.loaded["precision"]] for side in (runner, baseline))
    return Agreement(min(call.psnr_db for call in runner.calls if call.psnr_db is not None), limit)
