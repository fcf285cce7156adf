"""The times of one run as `compare` needs them, read from a report of `sana-export bench` or of `make gpu-check`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.bench.candidates.table import BASELINE
from sana_export.bench.gpu_check.check import PASSED
from sana_export.bench.gpu_check.latency import STAGES
from sana_export.bench.gpu_check.report import SCHEMA_VERSION as GPU_CHECK_VERSION
from sana_export.bench.report.document import SCHEMA_VERSION as BENCH_VERSION
from sana_export.errors import ArtifactError

BENCH, GPU_CHECK = "sana-export bench", "make gpu-check"
#: Fields of a workload that may differ between runs that are compared.
_MAY_DIFFER = ("warmup", "repeats", "sweep")
#: What nvidia-smi states that stays the same while a GPU works.
_GPU_LIMITS = ("clocks.max.sm", "clocks.max.memory", "power.limit", "memory.total")

#: Backend and stage.
Key = tuple[str, str]


@dataclass(frozen=True)
class TimedStage:
    """The times of one stage of one backend."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    #: Eager's time divided by this one. None for eager itself, and if eager was not timed.
    ratio: float | None


@dataclass(frozen=True)
class TimedRun:
    """One run."""

    #: Name of the report.
    name: str
    #: The command that made the report: BENCH or GPU_CHECK.
    made_by: str
    #: What was sampled. Only runs of the same workload can be compared.
    workload: Mapping[str, Any]
    #: Every measured time.
    stages: Mapping[Key, TimedStage]
    #: What was to be timed to the reason why its times do not count. None: they count.
    reasons: Mapping[str, str | None]
    #: What else decides the times: the machine, versions, the bundle.
    facts: Mapping[str, Any]
    #: What was wrong with the run, as the end of a sentence.
    doubts: tuple[str, ...]


def read_run(path: Path) -> TimedRun:
    """The run that the report at `path` is about. `path` may also be the folder of a bench.json.

    Raises ArtifactError if it is not a report of this version.
    """
    path = path / "bench.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read", found=error, wanted=_WANTED, fix=_fix(path)) from error
    return run_of(document, path)


def run_of(document: Any, path: Path) -> TimedRun:
    """The run that `document` is about, which was read from `path`. Raises ArtifactError if it is not a report of this version."""
    keys = document if isinstance(document, dict) else {}
    for own_key, (made_by, version, read) in _KINDS.items():
        if own_key in keys:
            found = keys.get("schema_version")
            if found != version:
                raise ArtifactError(
                    f"{path} is not a report of this version",
                    found=f"schema_version {found}",
                    wanted=f"schema_version {version}, as {made_by} writes it",
                    fix=_fix(path),
                )
            try:
                return read(document, str(path))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ArtifactError(
                    f"{path} is damaged", found=f"{type(error).__name__}: {error}", wanted=_WANTED, fix=_fix(path)
                ) from error
    found = ", ".join(map(repr, list(keys)[:4])) or type(document).__name__
    raise ArtifactError(f"{path} is not a report", found=found, wanted=_WANTED, fix=_fix(path))


def _fix(path: Path) -> str:
    return f"run {BENCH} again with -o {path.parent}, or {GPU_CHECK} GPU_REPORT={path}"


def _bench_run(document: Mapping[str, Any], name: str) -> TimedRun:
    return TimedRun(
        name,
        BENCH,
        workload={key: value for key, value in document["workload"].items() if key not in _MAY_DIFFER},
        stages=dict(_bench_stages(document)),
        reasons={backend: _bench_reason(entry) for backend, entry in document["backends"].items()},
        facts={f"{part} {key}": value for part in ("machine", "versions", "bundle") for key, value in document[part].items()},
        doubts=(f"was noisy ({'; '.join(document['noise'])})",) if document["noisy"] else (),
    )


def _bench_stages(document: Mapping[str, Any]) -> Iterator[tuple[Key, TimedStage]]:
    """A point of the sweep counts as a stage of its own."""
    for name, backend in document["backends"].items():
        for stage, entry in backend["stages"].items():
            if entry is not None:
                yield (name, stage), _bench_stage(entry)
    for point in document["sweep"]:
        where = f"{point['height']}x{point['width']}, {point['images_per_prompt']} image(s), end_to_end"
        for name, backend in point["backends"].items():
            if backend["end_to_end"] is not None:
                yield (name, where), _bench_stage(backend["end_to_end"])


def _bench_stage(entry: Mapping[str, Any]) -> TimedStage:
    ratio = entry["ratio_to_eager"]
    return TimedStage(entry["median_ms"], entry["p10_ms"], entry["p90_ms"], ratio and ratio["median"])


def _bench_reason(backend: Mapping[str, Any]) -> str | None:
    if reason := backend["failed"] or backend["skipped"]:
        return _one_line(reason)
    agreement = backend["agreement"]
    if agreement is None or agreement["agrees"]:
        return None
    return f"its images no longer agree with eager's: {agreement['psnr_db']} dB"


def _gpu_check_run(document: Mapping[str, Any], name: str) -> TimedRun:
    """A latency part is what was to be timed. Its model and batch are part of the stage's name."""
    parts = {part: entry for part, entry in document["parts"].items() if part.startswith("latency/") and entry is not None}
    return TimedRun(
        name,
        GPU_CHECK,
        workload={"device": document["device"]},
        stages=dict(_gpu_check_stages(parts)),
        reasons={part.removeprefix("latency/"): _gpu_check_reason(entry) for part, entry in parts.items()},
        facts=dict(_gpu_check_facts(document)),
        doubts=tuple(_gpu_check_doubts(parts)),
    )


def _gpu_check_reason(part: Mapping[str, Any]) -> str | None:
    return None if part["status"] == PASSED else _one_line(part["reason"])


def _rows(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Backend, model, batch and its row."""
    for name, part in parts.items():
        _, model, backend = name.split("/")
        for batch, row in part["found"].get("rows", {}).items():
            yield backend, model, batch, row


def _gpu_check_stages(parts: Mapping[str, Any]) -> Iterator[tuple[Key, TimedStage]]:
    eager = {(model, batch): row for backend, model, batch, row in _rows(parts) if backend == BASELINE}
    for backend, model, batch, row in _rows(parts):
        for stage in STAGES:
            if (entry := row[stage]) is not None:
                base = None if backend == BASELINE else eager.get((model, batch), {}).get(stage)
                ratio = base and base["median"] / entry["median"]
                yield (backend, f"{model}, batch {batch}, {stage}"), TimedStage(entry["median"], entry["p10"], entry["p90"], ratio)


def _gpu_check_facts(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    found = (document["parts"].get("find") or {}).get("found", {})
    loaded = {name: module["version"] for name, module in found.get("modules", {}).items() if "version" in module}
    for key, value in document["machine"].items():
        yield f"machine {key}", value
    # What was loaded counts more than what is installed: two packages may provide one module.
    for key, value in {**document["versions"], **loaded}.items():
        yield f"versions {key}", value
    yield "compute capability", found.get("compute_capability")
    for index, state in enumerate(found.get("gpu_state", ())):
        for key in _GPU_LIMITS:
            yield f"GPU {index} {key}", state.get(key)


def _gpu_check_doubts(parts: Mapping[str, Any]) -> Iterator[str]:
    slowed = defaultdict(list)
    for backend, model, batch, row in _rows(parts):
        for reason in (row.get("gpu") or {}).get("slowed_by", ()):
            slowed[reason].append(f"{backend}, {model}, batch {batch}")
    for reason, rows in slowed.items():
        yield f"was slowed down by: {reason} ({'; '.join(rows)})"


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())


_WANTED = f"a bench.json of {BENCH}, or a report of {GPU_CHECK}"
#: A key that only this kind of report has, to the command that writes it, its version, and the function that reads it.
_KINDS: dict[str, tuple[str, int, Callable[[Mapping[str, Any], str], TimedRun]]] = {
    "backends": (BENCH, BENCH_VERSION, _bench_run),
    "parts": (GPU_CHECK, GPU_CHECK_VERSION, _gpu_check_run),
}
