"""Times backends in rounds: each is loaded in its own process, then they are called in turn."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.bench.candidates.table import BASELINE, Job, find_row
from sana_export.bench.candidates.worker import Worker, WorkerFailed
from sana_export.bench.gpu_watch import GpuWatch
from sana_export.bench.load_meter import LoadMeter
from sana_export.bench.stages import Call
from sana_export.bench.workload import Workload
from sana_export.export.parity import psnr
from sana_export.formats.arrays import Array
from sana_export.progress import OnProgress, Progress

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


def measure(jobs: Sequence[Job], named: set[str], steps: Steps) -> Measured:
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
