"""The report as one JSON document; benchmarks/README.md explains its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sana_export.bench.candidates.table import BASELINE
from sana_export.bench.report.result import BackendResult, BenchReport, SweepPoint
from sana_export.bench.stages import END_TO_END, STAGES, StageResult
from sana_export.bench.work.count import Achieved, Work
from sana_export.bench.workload import Workload
from sana_export.json_records import json_value

SCHEMA_VERSION = 2


def document(report: BenchReport) -> dict[str, Any]:
    """`report` as a document for JSON."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": report.created,
        "machine": dict(report.machine),
        "versions": dict(report.versions),
        "bundle": dict(report.bundle),
        "workload": {**_workload(report.workload), "threads": report.threads},
        "other_load": report.other_load,
        "noisy": report.noisy,
        "noise": report.noise,
        "baseline": BASELINE,
        "agrees": report.agrees,
        "ceiling": report.rates and report.rates.as_json(),
        "work": {
            whose: {stage: _work(report, whose, stage, stages) for stage in STAGES if stage in stages}
            for whose, stages in report.work.items()
        },
        "backends": {name: _backend(report, name, result) for name, result in report.backends.items()},
        "sweep": [_point(point) for point in report.sweep],
    }


def _workload(workload: Workload) -> dict[str, Any]:
    fields = dataclasses.asdict(workload)
    return {**fields, "prompts": list(workload.prompts), "sweep": [dict(point) for point in workload.sweep]}


def _work(report: BenchReport, whose: str, stage: str, stages: Mapping[str, Work]) -> dict[str, Any]:
    """FLOP and bytes of one call (the mean over the prompts), and the least time at the ceiling."""
    calls, work = len(report.workload.prompts), stages[stage]
    return {"flop": work.flop / calls, "bytes": work.bytes / calls, "floor_ms": report.floor_ms(whose, stage)}


def _backend(report: BenchReport, name: str, result: BackendResult) -> dict[str, Any]:
    agreement = result.agreement
    return {
        "description": result.description,
        "failed": None if result.skipped else result.failed,
        "skipped": result.failed if result.skipped else None,
        "load_seconds": result.load_seconds,
        "peak_memory": {"rss_bytes": result.peak_rss_bytes, "device_bytes": result.peak_device_bytes},
        "gpu": result.gpu and dict(result.gpu),
        "agreement": agreement
        and {"psnr_db": json_value(agreement.psnr_db), "limit_db": agreement.limit_db, "agrees": agreement.agrees},
        "speedup": result.speedup,
        "work": result.work,
        "stages": {stage: _stage(result.stages.get(stage), report.achieved(name, stage)) for stage in STAGES},
    }


def _stage(measured: StageResult | None, achieved: Achieved | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    ms, ratio = measured.ms, measured.ratio
    return {
        "n": ms.n,
        "median_ms": ms.median,
        "p10_ms": ms.p10,
        "p90_ms": ms.p90,
        "first_ms": measured.first_ms,
        "ratio_to_eager": ratio and dataclasses.asdict(ratio),
        "achieved": achieved and dataclasses.asdict(achieved),
    }


def _point(point: SweepPoint) -> dict[str, Any]:
    work = point.workload
    keys = ("height", "width", "images_per_prompt", "num_inference_steps", "warmup", "repeats")
    return {**{key: getattr(work, key) for key in keys}, "backends": {name: _brief(end) for name, end in point.backends.items()}}


def _brief(result: BackendResult) -> dict[str, Any]:
    """A backend's entry in a point of the sweep: end to end only."""
    whole = _stage(result.stages.get(END_TO_END), None)
    if whole is not None:
        del whole["achieved"]
    return {
        "failed": result.failed,
        "end_to_end": whole,
        "speedup": result.speedup,
        "psnr_db": None if result.agreement is None else json_value(result.agreement.psnr_db),
        "peak_memory": {"rss_bytes": result.peak_rss_bytes, "device_bytes": result.peak_device_bytes},
    }
