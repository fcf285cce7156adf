from __future__ import annotations

import random
import statistics

import pytest

from sana_export.bench.candidates.eager import stage_times as pipeline_times
from sana_export.bench.candidates.runtime import stage_times as runtime_times
from sana_export.bench.stages import Call, pair_ratios, stage_results, summarize
from sana_export.runtime.results import Timings


def test_summary_interpolates_between_neighbours() -> None:
    # p10 of five values lies 0.4 of the way from the first to the second.
    summary = summarize([50.0, 10.0, 20.0, 40.0, 30.0])
    assert summary is not None
    assert (summary.n, summary.median) == (5, 30.0)
    assert [summary.p10, summary.p90] == pytest.approx([14.0, 46.0])
    assert summarize([]) is None
    one = summarize([7.0])
    assert one is not None
    assert (one.n, one.median, one.p10, one.p90) == (1, 7.0, 7.0, 7.0)


def test_summary_equals_the_standard_library() -> None:
    values = [random.random() for _ in range(31)]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    summary = summarize(values)
    assert summary is not None
    assert summary.median == pytest.approx(statistics.median(values))
    assert [summary.p10, summary.p90] == pytest.approx([deciles[0], deciles[-1]])


def call(number: int, prompt: int, *times: float, stage: str = "end_to_end") -> Call:
    return Call(number, prompt, {stage: list(times)})


def test_ratios_are_taken_pair_by_pair() -> None:
    """If the machine becomes ten times slower, the ratios stay the same, while medians over all rounds would be wrong."""
    slowdown = [1.0, 1.0, 10.0, 10.0]
    baseline = [call(number, 0, 30.0 * factor) for number, factor in enumerate(slowdown)]
    ours = [call(number, 0, 20.0 * factor) for number, factor in enumerate(slowdown)][:3]
    assert pair_ratios("end_to_end", baseline, reversed(ours)) == pytest.approx([1.5, 1.5, 1.5])


def test_calls_without_a_partner_or_the_stage_have_no_ratio() -> None:
    baseline = [call(0, 0, 4.0), call(0, 1, 6.0), call(1, 0, 100.0, stage="denoise_step")]
    ours = [call(0, 1, 3.0), call(1, 0, 1.0), call(2, 0, 1.0), call(0, 0, 8.0)]
    assert pair_ratios("end_to_end", baseline, ours) == pytest.approx([2.0, 0.5])


def test_a_call_counts_with_the_median_of_its_steps() -> None:
    baseline = [call(0, 0, 9.0, 10.0, 50.0, stage="denoise_step")]
    ours = [call(0, 0, 5.0, 1.0, 99.0, stage="denoise_step")]
    assert pair_ratios("denoise_step", baseline, ours) == pytest.approx([2.0])


def test_stage_results_keep_the_first_call_apart() -> None:
    first = call(0, 0, 900.0)
    calls = [call(1, 0, 10.0), call(2, 0, 12.0)]
    results = stage_results(first, calls, [call(1, 0, 20.0), call(2, 0, 36.0)])
    assert set(results) == {"end_to_end"}
    found = results["end_to_end"]
    assert (found.first_ms, found.ms.n, found.ms.median) == (900.0, 2, 11.0)
    assert found.ratio is not None
    assert [found.ratio.n, found.ratio.median] == pytest.approx([2, 2.5])
    assert stage_results(first, calls, None)["end_to_end"].ratio is None


def test_stages_of_a_diffusers_call() -> None:
    moments = {"encode": 0.0, "encoded": 100.0, "done": 1000.0, "decode": 700.0}
    events = [(name, moments[name]) for name in ("encode", "encoded")]
    events += [("step", 110.0), ("step", 300.0), ("step", 480.0)]
    events += [(name, moments[name]) for name in ("decode", "done")]
    assert pipeline_times(events) == {
        "text_encoder": [100.0],
        "denoise_step": [190.0, 180.0, 220.0],
        "denoise_loop": [590.0],
        "vae_decoder": [300.0],
    }


def test_stages_of_a_call_of_the_runtime() -> None:
    times = runtime_times(Timings(text_encoder=0.25, context=0.5, denoise=(1.0, 2.0), denoise_loop=3.5, vae_decoder=4.0, total=8.0))
    assert times == {
        "text_encoder": [250.0],
        "context": [500.0],
        "denoise_step": [1000.0, 2000.0],
        "denoise_loop": [3500.0],
        "vae_decoder": [4000.0],
    }
