"""Compares two runs of one workload: what got faster or slower by more than a threshold and more than the spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.bench.candidates.table import BASELINE
from sana_export.bench.report.timed_run import Key, TimedRun, TimedStage, read_run
from sana_export.errors import UsageError

BETTER, WORSE, SAME = "better", "worse", ""


@dataclass(frozen=True)
class Change:
    """One stage of one backend in both reports."""

    #: Name of the backend.
    backend: str
    #: Name of the stage; for a point of the sweep its size and batch too, and for gpu-check the model and the batch.
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
    #: Backend (for gpu-check, model and backend) to the reason why it has times that count only in the first report.
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
    """Compare two reports of `sana-export bench`, or two of `make gpu-check`.

    Raises ArtifactError if a file is not a report, UsageError if the two are of different kinds or workloads.
    """
    return compare(read_run(before), read_run(after), threshold)


def compare(before: TimedRun, after: TimedRun, threshold: float) -> Comparison:
    """Compare two runs. `threshold` is a fraction: 0.05 is 5%."""
    if before.made_by != after.made_by:
        raise UsageError(
            "reports of different kinds cannot be compared",
            found=f"{before.name}, made by {before.made_by}, and {after.name}, made by {after.made_by}",
            wanted="two reports of one kind",
            fix=f"run {before.made_by} both times",
        )
    for key, value in before.workload.items():
        if after.workload.get(key) != value:
            raise UsageError(
                "reports of different workloads cannot be compared",
                found=f"{key} {value!r} in {before.name}, {after.workload.get(key)!r} in {after.name}",
                wanted="the same workload in both",
                fix=f"run {before.made_by} both times with the same options",
            )
    return Comparison(
        before.name,
        after.name,
        threshold,
        BASELINE,
        tuple(_change(key, stage, after.stages[key], threshold) for key, stage in before.stages.items() if key in after.stages),
        _lost(before.reasons, after.reasons),
        tuple(_differences(before, after)),
    )


def _change(key: Key, before: TimedStage, after: TimedStage, threshold: float) -> Change:
    verdict = SAME
    if _beyond(before, after, threshold):
        verdict = WORSE
    elif _beyond(after, before, threshold):
        verdict = BETTER
    backend, stage = key
    return Change(
        backend,
        stage,
        before.median_ms,
        after.median_ms,
        (before.p10_ms, before.p90_ms),
        (after.p10_ms, after.p90_ms),
        before.ratio,
        after.ratio,
        verdict,
    )


def _beyond(fast: TimedStage, slow: TimedStage, threshold: float) -> bool:
    """Whether `slow` is slower than `fast` by more than the threshold and the spread.

    If both have a ratio to eager, the ratio must show it too: if eager got slower by as much, the machine did.
    """
    if slow.median_ms <= fast.median_ms * (1.0 + threshold) or slow.p10_ms <= fast.p90_ms:
        return False
    return fast.ratio is None or slow.ratio is None or fast.ratio > slow.ratio * (1.0 + threshold)


def _lost(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> dict[str, str]:
    """What has times that count in the first report only, with the reason."""
    reasons = {name: after.get(name, "not in the second report") for name, reason in before.items() if reason is None}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _differences(before: TimedRun, after: TimedRun) -> Iterator[str]:
    for key in {**before.facts, **after.facts}:
        old, new = before.facts.get(key), after.facts.get(key)
        if old != new:
            yield f"{key}: {old} to {new}"
    for name, run in (("first", before), ("second", after)):
        yield from (f"the {name} run {doubt}" for doubt in run.doubts)
