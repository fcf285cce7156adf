"""A whole benchmark: load each backend in its own process, call them in turn, compare, report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sana_export.bench.candidates.table import ALL, BASELINE, Job, check_names, find_row
from sana_export.bench.candidates.worker import Worker, WorkerFailed
from sana_export.bench.gpu_watch import GpuWatch
from sana_export.bench.report.result import Agreement, BackendResult, BenchReport, SweepPoint
from sana_export.bench.report.write import write_report
from sana_export.bench.rounds import BenchRunner, Measured, Steps, measure
from sana_export.bench.stages import Call, stage_results
from sana_export.bench.work.ceiling import better
from sana_export.bench.work.count import Rates
from sana_export.bench.work.workload import workload_work
from sana_export.bench.workload import Workload, load_workload
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.errors import UsageError
from sana_export.export.parity import IMAGE_PSNR_LIMITS
from sana_export.files import disk_errors
from sana_export.machine import describe_machine, describe_versions
from sana_export.manifest import Manifest
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.verify.bundle import check_origin

log = logging.getLogger(__name__)


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

    Raises UsageError for an unknown backend or workload, a `device` for a workload on the CPU, or another checkpoint, ArtifactError
    if the bundle cannot be read, DependencyError if `output` cannot be written.
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
            fix="leave out --device, or use --workload laptop",
        )
    manifest = Manifest.load(bundle)
    check_origin(bundle, manifest, checkpoint, "bench")
    if output is not None:
        with disk_errors(output):  # now, not after minutes of measuring
            output.mkdir(parents=True, exist_ok=True)
    amounts = workload_work(bundle, manifest, checkpoint, work)
    runs = [[_job(name, bundle, checkpoint, manifest, point, device) for name in names] for point in (work, *work.points())]
    steps = Steps(sum(len(jobs) + jobs[0].workload.warmup + jobs[0].workload.repeats for jobs in runs if jobs) + 2, on_progress)
    before = _rates(runs[0][0], steps)
    measured = measure(runs[0], named, steps)
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
    return SweepPoint(work, _results(measure(kept, set(), steps), work))


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
        vae=None if checkpoint.vae is None else str(checkpoint.vae.folder.resolve()),
        loras=tuple((str(lora.path.resolve()), lora.scale, lora.layer_scales) for lora in checkpoint.loras),
        device=device,
    )


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
