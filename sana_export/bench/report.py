"""The result of a benchmark as data, as JSON and as a Markdown table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.bench.candidates import BASELINE
from sana_export.bench.stages import END_TO_END, STAGES, StageResult, Summary
from sana_export.bench.workload import Workload

SCHEMA_VERSION = 1
#: Above this share of the cores' time for other processes a run counts as noisy.
NOISY_LOAD = 0.1
JSON_NAME, TEXT_NAME = "bench.json", "bench.md"


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
    """One backend. `failed` is the reason why it has no stages, else None. Memory is its own process's, in bytes.

    `agreement` is None for the baseline, and where the baseline or the backend failed.
    """

    name: str
    description: str
    failed: str | None
    load_seconds: float | None = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    stages: Mapping[str, StageResult] = dataclasses.field(default_factory=dict)
    agreement: Agreement | None = None

    @property
    def speedup(self) -> float | None:
        """The median ratio to the baseline end to end; None where its images do not agree: a wrong answer has no speed."""
        if self.agreement is None or not self.agreement.agrees or END_TO_END not in self.stages:
            return None
        ratio = self.stages[END_TO_END].ratio
        return None if ratio is None else ratio.median


@dataclass(frozen=True)
class BenchReport:
    """All of one run. `bundle` says what was timed: source, precision, clamp, pag_layers, export_key, synthetic.

    `other_load`: the share of the cores' time that other processes used while it ran; None where the system does not tell.
    """

    created: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    bundle: Mapping[str, Any]
    workload: Workload
    threads: int
    other_load: float | None
    backends: Mapping[str, BackendResult]

    @property
    def agrees(self) -> bool:
        """Whether every backend that could be compared draws the baseline's images."""
        return all(result.agreement is None or result.agreement.agrees for result in self.backends.values())

    @property
    def noisy(self) -> bool:
        """Whether other processes used so much of the machine that the times mean little."""
        return self.other_load is not None and self.other_load > NOISY_LOAD

    @property
    def failed(self) -> dict[str, str]:
        """Backend to reason, of those that failed."""
        return {name: result.failed for name, result in self.backends.items() if result.failed is not None}

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON document (benchmarks/README.md explains its keys)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "bundle": dict(self.bundle),
            "workload": {**dataclasses.asdict(self.workload), "prompts": list(self.workload.prompts), "threads": self.threads},
            "other_load": self.other_load,
            "noisy": self.noisy,
            "baseline": BASELINE,
            "agrees": self.agrees,
            "backends": {name: _backend_json(result) for name, result in self.backends.items()},
        }

    def as_text(self) -> str:
        """The report as Markdown: what was run, then a row for each stage and backend."""
        return "\n".join([*self._heading(), "", *self._table(), "", *self._notes()]) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write bench.json and bench.md into `folder`, each under a temporary name first; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        document = json.dumps(self.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        paths = []
        for name, content in ((JSON_NAME, document), (TEXT_NAME, self.as_text())):
            temporary = folder / f"{name}.tmp"
            temporary.write_text(content, "utf-8")
            paths.append(temporary.replace(folder / name))
        return paths

    def _heading(self) -> list[str]:
        work, machine = self.workload, self.machine
        gpu = f", {', '.join(machine['gpu'])}" if machine["gpu"] else ""
        guidance = f"guidance {work.guidance_scale:g}" + (f", PAG {work.pag_scale:g}" if work.pag_scale else "")
        images = f"{len(work.prompts)} prompt(s), {work.images_per_prompt} image(s) of each in a call"
        synthetic = " (synthetic weights)" if self.bundle["synthetic"] else ""
        return [
            f"# {self.bundle['source']}{synthetic}: {work.name}",
            "",
            f"{work.height}x{work.width} px, {work.num_inference_steps} steps, {guidance}; {images}; {work.warmup} warm-up and "
            f"{work.repeats} counted rounds, taking turns; {self.threads} threads.",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB{gpu}; {machine['os']}; "
            f"Python {machine['python']}, {', '.join(f'{name} {version}' for name, version in self.versions.items())}.",
        ]

    def _table(self) -> list[str]:
        rows = ["| stage | backend | n | median ms | p10 to p90 | first call | times as fast as eager (p10 to p90) |"]
        rows.append("|---|---|---:|---:|---:|---:|---:|")
        for stage in STAGES:
            for name, result in self.backends.items():
                if (measured := result.stages.get(stage)) is not None:
                    rows.append(_row(stage, name, measured))
        return rows

    def _notes(self) -> list[str]:
        notes = [f"- {name}: {_note(result)}" for name, result in self.backends.items()]
        if self.other_load is not None:
            verdict = "NOISY, its times mean little" if self.noisy else "quiet"
            notes.append(f"- other processes used {self.other_load:.0%} of the cores meanwhile: {verdict}")
        return notes


def _row(stage: str, name: str, measured: StageResult) -> str:
    ms, ratio = measured.ms, measured.ratio
    first = "" if measured.first_ms is None else f"{measured.first_ms:.1f}"
    faster = "" if ratio is None else f"{ratio.median:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})"
    return f"| {stage} | {name} | {ms.n} | {ms.median:.1f} | {ms.p10:.1f} to {ms.p90:.1f} | {first} | {faster} |"


def _note(result: BackendResult) -> str:
    if result.failed is not None:
        return "FAILED: " + " ".join(result.failed.split())
    parts = [result.description]
    if result.load_seconds is not None:
        parts.append(f"loaded in {result.load_seconds:.1f} s")
    for what, amount in (("memory", result.peak_rss_bytes), ("device memory", result.peak_device_bytes)):
        if amount is not None:
            parts.append(f"peak {what} {amount / 2**20:.0f} MiB")
    if (agreement := result.agreement) is not None:
        verdict = "agrees" if agreement.agrees else "DOES NOT AGREE, its times do not count"
        parts.append(f"image {agreement.psnr_db:.1f} dB against {BASELINE} (limit {agreement.limit_db:g}): {verdict}")
    return ", ".join(parts)


def _backend_json(result: BackendResult) -> dict[str, Any]:
    agreement = result.agreement
    return {
        "description": result.description,
        "failed": result.failed,
        "load_seconds": result.load_seconds,
        "peak_memory": {"rss_bytes": result.peak_rss_bytes, "device_bytes": result.peak_device_bytes},
        "agreement": agreement
        and {"psnr_db": _finite(agreement.psnr_db), "limit_db": agreement.limit_db, "agrees": agreement.agrees},
        "speedup": result.speedup,
        "stages": {stage: _optional(_stage_json, result.stages.get(stage)) for stage in STAGES},
    }


def _stage_json(measured: StageResult) -> dict[str, Any]:
    ms = measured.ms
    return {
        "n": ms.n,
        "median_ms": ms.median,
        "p10_ms": ms.p10,
        "p90_ms": ms.p90,
        "first_ms": measured.first_ms,
        "ratio_to_eager": _optional(dataclasses.asdict, measured.ratio),
    }


def _optional(function: Callable[[Any], Any], value: StageResult | Summary | None) -> Any:
    return None if value is None else function(value)


def _finite(value: float) -> float | str:
    """JSON has no infinity: it is written as the string that Python prints."""
    return value if math.isfinite(value) else str(value)
