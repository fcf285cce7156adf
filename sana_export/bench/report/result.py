"""The result of a benchmark as data. The other modules of this folder turn it into JSON, text, a page and plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from sana_export.bench.stages import END_TO_END, StageResult
from sana_export.bench.work.count import Achieved, Rates, Work
from sana_export.bench.workload import Workload

#: A run is noisy if other processes used more than this share of the cores' time.
NOISY_LOAD = 0.1
#: A run is also noisy if the middle 80% of a backend's end-to-end times span more than this share of their median.
NOISY_SPREAD = 0.2

Pixels = npt.NDArray[Any]


@dataclass(frozen=True)
class Agreement:
    """How close a backend's images are to the baseline's."""

    #: The lowest PSNR of all calls, each against the baseline's images of the same pair. Infinite if all are identical.
    psnr_db: float
    #: The PSNR that is required.
    limit_db: float

    @property
    def agrees(self) -> bool:
        return self.psnr_db >= self.limit_db


@dataclass(frozen=True)
class BackendResult:
    """The result of one backend."""

    #: Its name in the table of candidates.
    name: str
    #: What ran, on which device and in which dtypes.
    description: str
    #: Why it has no stages, or None.
    failed: str | None
    #: Time to load it.
    load_seconds: float | None = None
    #: The peak resident memory of its process.
    peak_rss_bytes: int | None = None
    #: The peak device memory of its process.
    peak_device_bytes: int | None = None
    #: Stage to its times.
    stages: Mapping[str, StageResult] = dataclasses.field(default_factory=dict)
    #: None for the baseline, and if the baseline or the backend failed.
    agreement: Agreement | None = None
    #: True if `failed` does not make the run fail: nobody asked for this backend by name.
    skipped: bool = False
    #: A key of the report's `work`, or None if nobody has counted the backend's work.
    work: str | None = None
    #: What the GPU reported during its turns (gpu_watch.py).
    gpu: Mapping[str, Any] | None = None

    @property
    def speedup(self) -> float | None:
        """The median ratio to the baseline end to end. None if the images do not agree: a wrong answer has no speed."""
        if self.agreement is None or not self.agreement.agrees or END_TO_END not in self.stages:
            return None
        ratio = self.stages[END_TO_END].ratio
        return None if ratio is None else ratio.median

    @property
    def spread(self) -> float | None:
        """The width of the middle 80% of the end-to-end times, as a share of their median."""
        if (whole := self.stages.get(END_TO_END)) is None:
            return None
        return (whole.ms.p90 - whole.ms.p10) / whole.ms.median if whole.ms.median else None


@dataclass(frozen=True)
class SweepPoint:
    """Another size or batch of the workload, with the result of each backend."""

    #: The workload with the point's size and batch.
    workload: Workload
    #: Name to result.
    backends: Mapping[str, BackendResult]


@dataclass(frozen=True, eq=False)
class BenchReport:
    """The result of one run."""

    #: Date and time of the end of the run, in ISO format.
    created: str
    #: The machine it ran on (`machine.describe_machine`).
    machine: Mapping[str, Any]
    #: Package to version.
    versions: Mapping[str, str]
    #: The bundle that was timed: source, precision, clamp, pag_layers, export_key, synthetic.
    bundle: Mapping[str, Any]
    #: What was sampled.
    workload: Workload
    #: The number of CPU threads of each backend.
    threads: int
    #: The share of the cores' time that other processes used during the run. None if the system does not report it.
    other_load: float | None
    #: Name to result, the baseline first.
    backends: Mapping[str, BackendResult]
    #: The machine's measured ceiling. None if it could not be measured.
    rates: Rates | None = None
    #: `BUNDLE` and `REFERENCE` to the work of each stage, summed over one call for each prompt.
    work: Mapping[str, Mapping[str, Work]] = dataclasses.field(default_factory=dict)
    #: Other sizes and batches.
    sweep: Sequence[SweepPoint] = ()
    #: Backend to its last images of the first prompt, uint8 [B, H, W, 3].
    images: Mapping[str, Pixels] = dataclasses.field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether every backend that was compared draws the baseline's images, also at every point of the sweep."""
        everything = [self.backends, *(point.backends for point in self.sweep)]
        results = [result for backends in everything for result in backends.values()]
        return all(result.agreement is None or result.agreement.agrees for result in results)

    @property
    def noise(self) -> list[str]:
        """Why the times are unreliable. Empty if the machine was quiet."""
        found = []
        if self.other_load is not None and self.other_load > NOISY_LOAD:
            found.append(f"other processes used {self.other_load:.0%} of the cores")
        for name, result in self.backends.items():
            if (spread := result.spread) is not None and spread > NOISY_SPREAD:
                found.append(f"the end-to-end times of {name} span {spread:.0%} of their median")
        return found

    @property
    def noisy(self) -> bool:
        return bool(self.noise)

    @property
    def failed(self) -> dict[str, str]:
        """Backend to reason, for those that failed."""
        return {name: result.failed for name, result in self.backends.items() if result.failed is not None and not result.skipped}

    @property
    def skipped(self) -> dict[str, str]:
        """Backend to reason, for those that were skipped."""
        return {name: result.failed for name, result in self.backends.items() if result.failed is not None and result.skipped}

    def achieved(self, backend: str, stage: str) -> Achieved | None:
        """The rates that `backend` achieved in `stage`. None if its work or the ceiling is unknown."""
        result = self.backends[backend]
        if self.rates is None or result.work is None or stage not in result.stages:
            return None
        work = self.work.get(result.work, {}).get(stage)
        # The work is that of all prompts, the time that of one.
        return None if work is None else Achieved.of(work, self.rates, result.stages[stage].ms.median * len(self.workload.prompts))

    def floor_ms(self, whose: str, stage: str) -> float | None:
        """The least milliseconds of one call at the measured ceiling, for the work of `whose` (`BUNDLE` or `REFERENCE`)."""
        if self.rates is None or (work := self.work.get(whose, {}).get(stage)) is None:
            return None
        return 1e3 * work.floor_seconds(self.rates) / len(self.workload.prompts)
