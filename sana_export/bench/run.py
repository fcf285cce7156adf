"""A benchmark from start to end: load every backend in its own process, take turns, compare, report."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.bench.candidates import BASELINE, Job, check_names, find_row
from sana_export.bench.machine import busy_seconds, describe_machine, describe_versions
from sana_export.bench.report import Agreement, BackendResult, BenchReport
from sana_export.bench.stages import Call, stage_results
from sana_export.bench.worker import Worker, WorkerFailed
from sana_export.bench.workload import Workload, load_workload
from sana_export.disk import disk_errors
from sana_export.export.parity import IMAGE_PSNR_LIMITS, Array, psnr
from sana_export.graphs.checkpoint import SanaCheckpoint
from sana_export.manifest import Manifest

log = logging.getLogger(__name__)

#: Threads of a library spin for a moment after its work: that long the next backend waits for its turn.
_SETTLE_SECONDS = 0.05

#: Called with what is about to be done, the count of things done and of all.
OnProgress = Callable[[str, int, int], None]


@dataclass
class Runner:
    """One backend while it is timed: its process, its answers when it was loaded and to its last call, its calls, why it failed."""

    name: str
    worker: Worker | None = None
    loaded: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    failed: str | None = None


def run_bench(
    bundle: Path,
    checkpoint: SanaCheckpoint,
    *,
    backends: Sequence[str] = (BASELINE, "onnxruntime"),
    workload: str | Path | Workload = "cpu",
    output: Path | None = None,
    on_progress: OnProgress = lambda doing, done, total: None,
) -> BenchReport:
    """Time `backends` (names of `candidates.ROWS`) on `bundle` and on the checkpoint that it was exported from.

    A round is one call of each backend in turn for each prompt, with the same seed, so that whatever else the machine does falls
    on all alike; ratios are taken pair by pair. A backend that fails is reported as failed, and the others go on. `output` is a
    folder for bench.json and bench.md. Raises UsageError for an unknown backend or workload, ArtifactError for a bundle that
    cannot be read, DependencyError where `output` cannot be written.
    """
    names = check_names(backends)
    work = workload if isinstance(workload, Workload) else load_workload(workload)
    manifest = Manifest.load(bundle)
    if output is not None:
        with disk_errors(output):  # before the minutes, not after them
            output.mkdir(parents=True, exist_ok=True)
    jobs = [_job(name, bundle, checkpoint, manifest, work) for name in names]
    runners, other_load = _measure(jobs, work, on_progress)
    baseline = next((runner for runner in runners if runner.name == BASELINE and runner.failed is None), None)
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
        other_load=other_load,
        backends={runner.name: _result(runner, baseline, work.warmup) for runner in runners},
    )
    if output is not None:
        with disk_errors(output):
            report.write(output)
    return report


def _job(name: str, bundle: Path, checkpoint: SanaCheckpoint, manifest: Manifest, work: Workload) -> Job:
    return Job(
        backend=name,
        bundle=str(bundle.resolve()),
        checkpoint=str(checkpoint.folder.resolve()),
        weights_variant=checkpoint.weights_variant,
        precision=manifest.options.precision,
        clamp=manifest.options.clamp,
        pag_layers=manifest.options.pag_layers,
        threads=work.resolved_threads(),
        workload=work,
        transformer=None if checkpoint.transformer_file is None else str(checkpoint.transformer_file.resolve()),
        loras=tuple((str(lora.path.resolve()), lora.scale) for lora in checkpoint.loras),
    )


def _measure(jobs: Sequence[Job], work: Workload, on_progress: OnProgress) -> tuple[list[Runner], float | None]:
    """The runners with all their calls, and the share of the cores that other processes used during the rounds."""
    rounds = work.warmup + work.repeats
    total = len(jobs) + rounds
    with contextlib.ExitStack() as stack:
        images = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sana-export-bench-"))) / "images.npy"
        runners = []
        for done, job in enumerate(jobs):
            on_progress(f"loading {job.backend}", done, total)
            runners.append(_start(job, stack))
        started, elsewhere = time.monotonic(), _elsewhere(runners)
        for number in range(rounds):
            on_progress(f"round {number + 1} of {rounds}", len(jobs) + number, total)
            for index in range(len(work.prompts)):
                _take_turns(runners, number, index, work, images)
        available = (time.monotonic() - started) * (os.cpu_count() or 1)
        on_progress("report", total, total)
        if elsewhere is None or (after := _elsewhere(runners)) is None:
            return runners, None
        return runners, min(max((after - elsewhere) / available, 0.0), 1.0)


def _elsewhere(runners: Sequence[Runner]) -> float | None:
    """Processor seconds that all other processes have used since the machine started; None where the system does not tell."""
    busy = busy_seconds()
    own = sum((runner.last or runner.loaded).get("cpu_seconds", 0.0) for runner in runners)
    return None if busy is None else busy - own - time.process_time()


def _start(job: Job, stack: contextlib.ExitStack) -> Runner:
    """Prepare and load a backend in its process, which `stack` ends."""
    runner = Runner(job.backend)
    try:
        if find_row(job.backend).prepare is not None:
            with Worker(job) as preparing:
                preparing.prepare()
        runner.worker = stack.enter_context(Worker(job))
        runner.loaded = runner.worker.load()
    except WorkerFailed as error:
        _fail(runner, error)
    return runner


def _fail(runner: Runner, error: WorkerFailed) -> None:
    log.warning("%s failed: %s", runner.name, error)
    runner.failed = str(error)


def _take_turns(runners: Sequence[Runner], number: int, index: int, work: Workload, images: Path) -> None:
    """One call of every backend, one after the other; the baseline comes first, and its images are the reference of the others."""
    reference: Array | None = None
    for runner in runners:
        if runner.worker is None or runner.failed is not None:
            continue
        time.sleep(_SETTLE_SECONDS)
        try:
            answer = runner.worker.call(work.prompts[index], work.seed, images)
        except WorkerFailed as error:
            _fail(runner, error)
            continue
        found = np.load(images)
        runner.last = answer
        runner.calls.append(Call(number, index, answer["times"], None if reference is None else _likeness(found, reference)))
        if runner.name == BASELINE:
            reference = found


def _likeness(images: Array, reference: Array) -> float:
    """PSNR in dB over all images of a call."""
    return psnr(images, reference, peak=255.0) if images.shape == reference.shape else float("-inf")


def _result(runner: Runner, baseline: Runner | None, warmup: int) -> BackendResult:
    """What `runner` has shown, against `baseline` unless that is None (absent, or it failed)."""
    description = runner.loaded.get("description", "")
    other = None if runner is baseline else baseline
    if runner.failed is not None:
        return BackendResult(runner.name, description, runner.failed)
    return BackendResult(
        runner.name,
        description,
        None,
        runner.loaded["load_seconds"],
        runner.last["peak_rss_bytes"],
        runner.last["peak_device_bytes"],
        stages=stage_results(runner.calls[0], _counted(runner, warmup), None if other is None else _counted(other, warmup)),
        agreement=None if other is None else _agreement(runner, other),
    )


def _counted(runner: Runner, warmup: int) -> list[Call]:
    return [call for call in runner.calls if call.round >= warmup]


def _agreement(runner: Runner, baseline: Runner) -> Agreement:
    limit = min(IMAGE_PSNR_LIMITS[side.loaded["precision"]] for side in (runner, baseline))
    return Agreement(min(call.psnr_db for call in runner.calls if call.psnr_db is not None), limit)
