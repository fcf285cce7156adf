"""The stages that are timed, and the statistics of their times. All times are in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

END_TO_END = "end_to_end"
#: Stage to what it covers.
STAGES = {
    "text_encoder": "prompts to embeddings, tokenizer included",
    "context": "embeddings to cross-attention keys and values (in diffusers, part of every step)",
    "denoise_step": "one step: denoiser, guidance and sampler",
    "denoise_loop": "all steps",
    "vae_decoder": "latents to uint8 images",
    END_TO_END: "the whole call, prompt to Pillow images",
}
#: Stage to its times in one call. A stage that runs several times has several; a stage that the backend does not have is missing.
StageTimes = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Summary:
    """The distribution of some values. Percentiles are interpolated linearly."""

    #: Number of values.
    n: int
    #: The 50th percentile.
    median: float
    #: The 10th percentile.
    p10: float
    #: The 90th percentile.
    p90: float


@dataclass(frozen=True)
class Call:
    """One call of a backend. Calls of two backends with the same round and prompt are a pair."""

    #: Number of the round, warm-up rounds included.
    round: int
    #: Index of the prompt.
    prompt: int
    #: Times of the stages.
    times: StageTimes
    #: PSNR of its images against the baseline's in the same pair. None for the baseline.
    psnr_db: float | None = None


@dataclass(frozen=True)
class StageResult:
    """The times of one stage of one backend."""

    #: Times after warm-up.
    ms: Summary
    #: Time in the first call of the process.
    first_ms: float | None
    #: The baseline's time divided by this one's, pair by pair: above 1 is faster than the baseline.
    ratio: Summary | None


def summarize(values: Iterable[float]) -> Summary | None:
    """The distribution of `values`. None if there are none."""
    array = np.fromiter(values, dtype=np.float64)
    if not array.size:
        return None
    p10, median, p90 = np.percentile(array, (10, 50, 90))
    return Summary(array.size, float(median), float(p10), float(p90))


def pair_ratios(stage: str, baseline: Iterable[Call], calls: Iterable[Call]) -> list[float]:
    """The baseline's time divided by the time in `calls`, for each pair. A call counts with its median time in the stage."""
    theirs = {(call.round, call.prompt): call.times.get(stage, ()) for call in baseline}
    ratios = []
    for call in calls:
        ours, other = call.times.get(stage, ()), theirs.get((call.round, call.prompt), ())
        if ours and other:
            ratios.append(float(np.median(other)) / float(np.median(ours)))
    return ratios


def stage_results(first: Call | None, calls: Sequence[Call], baseline: Sequence[Call] | None) -> dict[str, StageResult]:
    """The results of the stages that `calls` have. Without `baseline` they have no ratios."""
    results = {}
    for stage in STAGES:
        ms = summarize(time for call in calls for time in call.times.get(stage, ()))
        if ms is None:
            continue
        before = list(first.times.get(stage, ())) if first is not None else []
        ratio = None if baseline is None else summarize(pair_ratios(stage, baseline, calls))
        results[stage] = StageResult(ms, float(before[0]) if before else None, ratio)
    return results
