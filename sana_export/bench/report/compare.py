"""Compares two reports of one workload: what got faster or slower by more than a threshold and more than the spread."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.bench.report.document import SCHEMA_VERSION
from sana_export.errors import ArtifactError, UsageError

#: Fields of the workload that may differ between the two runs.
_MAY_DIFFER = ("warmup", "repeats", "sweep")
BETTER, WORSE, SAME = "better", "worse", ""


@dataclass(frozen=True)
class Change:
    """One stage of one backend in both reports."""

    #: Name of the backend.
    backend: str
    #: Name of the stage; for a point of the sweep, its size and batch too.
    stage: str
    #: Median milliseconds in the first report.
    before_ms: float
    #: Median milliseconds in the second report.
    after_ms: float
    #: p10 and p90 in the first report.
    before_spread_ms: tuple[float, float]
    #: p10 and p90 in the second report.
    after_spread_ms: tuple[float, float]
    #: Eager's time divided by this one's, in the first report. None for eager itself and without a pair.
    before_ratio: float | None
    #: The same in the second report.
    after_ratio: float | None
    #: BETTER, WORSE or SAME.
    verdict: str

    @property
    def change(self) -> float:
        """The relative change of the median: 0.1 means 10% slower."""
        return self.after_ms / self.before_ms - 1.0


@dataclass(frozen=True)
class Comparison:
    """The comparison of two reports."""

    #: Name of the first report.
    before: str
    #: Name of the second report.
    after: str
    #: How much slower a stage may get: 0.05 is 5%.
    threshold: float
    #: Name of the baseline.
    baseline: str
    #: Every stage that both reports have.
    changes: tuple[Change, ...]
    #: Backend to the reason why the second report has no valid time for it.
    lost: Mapping[str, str]
    #: Other differences between the two runs: machine, versions, bundle, noise.
    differs: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        """What got worse, without the baseline, which is not our code."""
        return [change for change in self.changes if change.verdict == WORSE and change.backend != self.baseline]

    @property
    def passed(self) -> bool:
        return not self.regressions and not self.lost

    def as_json(self) -> dict[str, Any]:
        changes = [{**dataclasses.asdict(change), "change": change.change} for change in self.changes]
        return {**dataclasses.asdict(self), "changes": changes, "passed": self.passed}

    def as_text(self) -> str:
        """Markdown: a row for each stage and backend, then notes."""
        columns = "| stage | backend | before ms (p10 to p90) | after ms (p10 to p90) | time | against eager | verdict |"
        rows = [columns, "|---|---|---:|---:|---:|---:|---|", *map(_row, self.changes)]
        notes = [f"{name}: {reason}" for name, reason in self.lost.items()]
        notes += [f"different: {entry}" for entry in self.differs]
        worse = ", ".join(f"{change.stage} of {change.backend} {change.change:+.0%}" for change in self.regressions)
        limit = f"{self.threshold:.0%} and the spread of the runs"
        notes.append(f"worse by more than {limit}: {worse}" if worse else f"nothing got worse by more than {limit}")
        return "\n".join([f"# {self.before} to {self.after}", "", *rows, "", *(f"- {note}" for note in notes)]) + "\n"


def _row(change: Change) -> str:
    (low, high), (low_after, high_after) = change.before_spread_ms, change.after_spread_ms
    ratios = (
        ""
        if change.before_ratio is None or change.after_ratio is None
        else f"{change.before_ratio:.2f} to {change.after_ratio:.2f}"
    )
    return (
        f"| {change.stage} | {change.backend} | {change.before_ms:.1f} ({low:.1f} to {high:.1f}) "
        f"| {change.after_ms:.1f} ({low_after:.1f} to {high_after:.1f}) | {change.change:+.1%} | {ratios} | {change.verdict} |"
    )


def compare_files(before: Path, after: Path, threshold: float) -> Comparison:
    """Compare two bench.json files.

    Raises ArtifactError if a file is not a report, UsageError if the workloads differ.
    """
    return compare(read_report(before), read_report(after), threshold, str(before), str(after))


def read_report(path: Path) -> dict[str, Any]:
    """The report at `path`, which may also be its folder. Raises ArtifactError if it is not a report of this version."""
    path = path / "bench.json" if path.is_dir() else path
    fix = f"run sana-export bench again with -o {path.parent}"
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read", found=error, wanted="a bench.json written by sana-export bench", fix=fix
        ) from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION or "backends" not in document:
        raise ArtifactError(
            f"{path} is not a report of this version",
            found=f"schema_version {found}",
            wanted=f"schema_version {SCHEMA_VERSION}",
            fix=fix,
        )
    return dict(document)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], threshold: float, old: str, new: str) -> Comparison:
    """Compare two documents, which messages call `old` and `new`. `threshold` is a fraction: 0.05 is 5%."""
    for key, value in before["workload"].items():
        if key not in _MAY_DIFFER and after["workload"].get(key) != value:
            raise UsageError(
                "reports of different workloads cannot be compared",
                found=f"{key} {value!r} in {old}, {after['workload'].get(key)!r} in {new}",
                wanted="the same workload in both",
                fix="time both with the same --workload",
            )
    counted = dict(_counted(after))
    changes = tuple(_change(key, entry, counted[key], threshold) for key, entry in _counted(before) if key in counted)
    return Comparison(
        old,
        new,
        threshold,
        before["baseline"],
        changes,
        _lost(before["backends"], after["backends"]),
        tuple(_differences(before, after)),
    )


#: Backend and stage.
Key = tuple[str, str]


def _counted(document: Mapping[str, Any]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Every measured time. A point of the sweep counts as a stage of its own."""
    for name, backend in document["backends"].items():
        for stage, entry in backend["stages"].items():
            if entry is not None:
                yield (name, stage), entry
    for point in document["sweep"]:
        where = f"{point['height']}x{point['width']}, {point['images_per_prompt']} image(s), end_to_end"
        for name, backend in point["backends"].items():
            if backend["end_to_end"] is not None:
                yield (name, where), backend["end_to_end"]


def _change(key: Key, before: Mapping[str, Any], after: Mapping[str, Any], threshold: float) -> Change:
    ratios = [entry["ratio_to_eager"] and entry["ratio_to_eager"]["median"] for entry in (before, after)]
    verdict = SAME
    if _beyond(before, after, ratios, threshold):
        verdict = WORSE
    elif _beyond(after, before, ratios[::-1], threshold):
        verdict = BETTER
    backend, stage = key
    return Change(
        backend,
        stage,
        before["median_ms"],
        after["median_ms"],
        (before["p10_ms"], before["p90_ms"]),
        (after["p10_ms"], after["p90_ms"]),
        ratios[0],
        ratios[1],
        verdict,
    )


def _beyond(fast: Mapping[str, Any], slow: Mapping[str, Any], ratios: list[float | None], threshold: float) -> bool:
    """Whether `slow` is slower than `fast` by more than the threshold and the spread.

    If both have a ratio to eager, the ratio must show it too: if eager got slower by as much, the machine did.
    """
    if slow["median_ms"] <= fast["median_ms"] * (1.0 + threshold) or slow["p10_ms"] <= fast["p90_ms"]:
        return False
    high, low = ratios
    return high is None or low is None or high > low * (1.0 + threshold)


def _lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Backends with valid times in the first report only, with the reason."""
    lost = {}
    for name, old in before.items():
        new = after.get(name, {"failed": "not in the second report", "skipped": None, "agreement": None})
        agreed = [side["agreement"] is None or side["agreement"]["agrees"] for side in (old, new)]
        if old["failed"] or old["skipped"] or not agreed[0]:
            continue
        if reason := new["failed"] or new["skipped"]:
            lost[name] = " ".join(str(reason).split())
        elif not agreed[1]:
            lost[name] = f"its images no longer agree with eager's: {new['agreement']['psnr_db']} dB"
    return lost


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for part in ("machine", "versions", "bundle"):
        for key in {**before[part], **after[part]}:
            old, new = before[part].get(key), after[part].get(key)
            if old != new:
                yield f"{part} {key}: {old} to {new}"
    for name, document in (("first", before), ("second", after)):
        if document["noisy"]:
            yield f"the {name} run was noisy ({'; '.join(document['noise'])})"
