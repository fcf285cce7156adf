"""The result of a benchmark as data, and the files that it is written to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sana_export.bench.stages import END_TO_END, StageResult
from sana_export.bench.work.count import Achieved, Rates, Work
from sana_export.bench.workload import Workload

SCHEMA_VERSION = 2
#: Above this share of the cores' time for other processes a run counts as noisy.
NOISY_LOAD = 0.1
#: So does one where the middle 80% of a backend's whole calls spread over more than this share of their median.
NOISY_SPREAD = 0.2
JSON_NAME, TEXT_NAME, PAGE_NAME = "bench.json", "bench.md", "bench.html"
IMAGES, PLOTS = "images", "plots"

Pixels = npt.NDArray[Any]


@dataclass(frozen=True)
class Agreement:
    """`psnr_db`: the least of all calls' images against the baseline's in the same pair, infinite where all are identical."""

    psnr_db: float
    limit_db: float

    @property
    def agrees(self) -> bool:
        return self.psnr_db >= self.limit_db


@dataclass(frozen=True)
class BackendResult:
    """One backend. `failed` is the reason why it has no stages, else None; `skipped`: that is no failure of the run.

    Memory is its own process's, in bytes. `agreement` is None for the baseline, and where the baseline or the backend failed.
    `work`: whose work it does, a key of the report's `work`. `gpu`: what was watched during its turns (gpu_watch.py).
    """

    name: str
    description: str
    failed: str | None
    load_seconds: float | None = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    stages: Mapping[str, StageResult] = dataclasses.field(default_factory=dict)
    agreement: Agreement | None = None
    skipped: bool = False
    work: str | None = None
    gpu: Mapping[str, Any] | None = None

    @property
    def speedup(self) -> float | None:
        """The median ratio to the baseline end to end; None where its images do not agree: a wrong answer has no speed."""
        if self.agreement is None or not self.agreement.agrees or END_TO_END not in self.stages:
            return None
        ratio = self.stages[END_TO_END].ratio
        return None if ratio is None else ratio.median

    @property
    def spread(self) -> float | None:
        """The width of the middle 80% of whole calls, as a share of their median."""
        if (whole := self.stages.get(END_TO_END)) is None:
            return None
        return (whole.ms.p90 - whole.ms.p10) / whole.ms.median if whole.ms.median else None


@dataclass(frozen=True)
class SweepPoint:
    """Another size or batch of the workload, and what each backend took for it."""

    workload: Workload
    backends: Mapping[str, BackendResult]


@dataclass(frozen=True, eq=False)
class BenchReport:
    """All of one run. `bundle` says what was timed: source, precision, clamp, pag_layers, export_key, synthetic.

    `other_load`: the share of the cores' time that other processes used while it ran; None where the system does not tell.
    `rates`: the machine's ceiling. `work`: by whose work it is, each stage's, summed over one call of each prompt. `images`: what
    each backend drew last for the first prompt, uint8 [B, H, W, 3].
    """

    created: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    bundle: Mapping[str, Any]
    workload: Workload
    threads: int
    other_load: float | None
    backends: Mapping[str, BackendResult]
    rates: Rates | None = None
    work: Mapping[str, Mapping[str, Work]] = dataclasses.field(default_factory=dict)
    sweep: Sequence[SweepPoint] = ()
    images: Mapping[str, Pixels] = dataclasses.field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether every backend that could be compared draws the baseline's images, at every point of the sweep too."""
        everything = [self.backends, *(point.backends for point in self.sweep)]
        results = [result for backends in everything for result in backends.values()]
        return all(result.agreement is None or result.agreement.agrees for result in results)

    @property
    def noise(self) -> list[str]:
        """Why the times mean little; nothing where the machine was quiet."""
        found = []
        if self.other_load is not None and self.other_load > NOISY_LOAD:
            found.append(f"other processes used {self.other_load:.0%} of the cores")
        for name, result in self.backends.items():
            if (spread := result.spread) is not None and spread > NOISY_SPREAD:
                found.append(f"{name}'s whole calls spread over {spread:.0%} of their median")
        return found

    @property
    def noisy(self) -> bool:
        return bool(self.noise)

    @property
    def failed(self) -> dict[str, str]:
        """Backend to reason, of those that failed."""
        return {name: result.failed for name, result in self.backends.items() if result.failed is not None and not result.skipped}

    @property
    def skipped(self) -> dict[str, str]:
        """Backend to reason, of those that were left out."""
        return {name: result.failed for name, result in self.backends.items() if result.failed is not None and result.skipped}

    def achieved(self, backend: str, stage: str) -> Achieved | None:
        """What `backend` came to in `stage`; None where its work or the ceiling is unknown."""
        result = self.backends[backend]
        if self.rates is None or result.work is None or stage not in result.stages:
            return None
        work = self.work.get(result.work, {}).get(stage)
        # The work is that of all prompts, the time that of one.
        return None if work is None else Achieved.of(work, self.rates, result.stages[stage].ms.median * len(self.workload.prompts))

    def floor_ms(self, whose: str, stage: str) -> float | None:
        """The least milliseconds of one call at the measured ceiling."""
        if self.rates is None or (work := self.work.get(whose, {}).get(stage)) is None:
            return None
        return 1e3 * work.floor_seconds(self.rates) / len(self.workload.prompts)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON document (benchmarks/README.md explains its keys)."""
        from sana_export.bench.report.document import document

        return document(self)

    def as_text(self) -> str:
        """The report as Markdown: what was run, then a row for each stage and backend."""
        from sana_export.bench.report.text import markdown

        return markdown(self)

    def write(self, folder: Path) -> list[Path]:
        """Write bench.json, bench.md, bench.html, images/ and, where matplotlib is installed, plots/ into `folder`.

        Each file is written under a temporary name first. Returns their paths, bench.json first.
        """
        from sana_export.bench.report.html import page
        from sana_export.bench.report.plots import draw_plots

        folder.mkdir(parents=True, exist_ok=True)
        images = self._write_images(folder / IMAGES)
        plots = draw_plots(self, folder / PLOTS)
        content = {
            JSON_NAME: json.dumps(self.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            TEXT_NAME: self.as_text(),
            PAGE_NAME: page(self, images, plots),
        }
        paths = []
        for name, text in content.items():
            temporary = folder / f"{name}.tmp"
            temporary.write_text(text, "utf-8")
            paths.append(temporary.replace(folder / name))
        return [*paths, *images.values(), *plots]

    def _write_images(self, folder: Path) -> dict[str, Path]:
        """The first image of each backend as PNG."""
        paths = {}
        for name, pixels in self.images.items():
            folder.mkdir(exist_ok=True)
            paths[name] = folder / f"{name.replace(':', '-')}.png"
            Image.fromarray(np.asarray(pixels[0], np.uint8)).save(paths[name])
        return paths
