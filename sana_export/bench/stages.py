"""The stages that are timed, and how the times of many calls become a few numbers. All times are milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

END_TO_END = "end_to_end"
#: Stage: what lies between its two clock readings.
STAGES = {
    "text_encoder": "prompts to embeddings, tokenizer included",
    "context": "embeddings to cross-attention keys and values (diffusers: part of every step)",
    "denoise_step": "one step: denoiser, guidance and sampler",
    "denoise_loop": "all steps",
    "vae_decoder": "latents to uint8 images",
    END_TO_END: "the whole call, prompt to Pillow images",
}
#: The times of one call: a stage that runs several times has several, a stage that a backend does not have has none.
StageTimes = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Summary:
    """The middle of n values and the bounds of their middle 80%, interpolated linearly between neighbours."""

    n: int
    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Call:
    """One call to a backend. Calls of two backends are a pair where round and prompt are the same.

    `psnr_db`: of its images against the baseline's in the same pair, None for the baseline itself.
    """

    round: int
    prompt: int
    times: StageTimes
    psnr_db: float | None = None


@dataclass(frozen=True)
class StageResult:
    """`ms`: times after warm-up. `first_ms`: of the process's first call. `ratio`: the baseline's time by it, above 1 is faster."""

    ms: Summary
    first_ms: float | None
    ratio: Summary | None


def summarize(values: Iterable[float]) -> Summary | None:
    """None where there is nothing to summarize."""
    array = np.fromiter(values, dtype=np.float64)
    if not array.size:
        return None
    p10, median, p90 = np.percentile(array, (10, 50, 90))
    return Summary(array.size, float(median), float(p10), float(p90))


def pair_ratios(stage: str, baseline: Iterable[Call], calls: Iterable[Call]) -> list[float]:
    """The baseline's time by ours for each pair, each call represented by the median of its times in that stage."""
    theirs = {(call.round, call.prompt): call.times.get(stage, ()) for call in baseline}
    ratios = []
    for call in calls:
        ours, other = call.times.get(stage, ()), theirs.get((call.round, call.prompt), ())
        if ours and other:
            ratios.append(float(np.median(other)) / float(np.median(ours)))
    return ratios


def stage_results(first: Call | None, calls: Sequence[Call], baseline: Sequence[Call] | None) -> dict[str, StageResult]:
    """The stages that `calls` have. `baseline` None leaves the ratios out."""
    results = {}
    for stage in STAGES:
        ms = summarize(time for call in calls for time in call.times.get(stage, ()))
        if ms is None:
            continue
        before = list(first.times.get(stage, ())) if first is not None else []
        ratio = None if baseline is None else summarize(pair_ratios(stage, baseline, calls))
        results[stage] = StageResult(ms, float(before[0]) if before else None, ratio)
    return results
