"""The report's plots as PNG files. Without matplotlib (extra `bench`) there are none."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sana_export.bench.report.result import BenchReport, SweepPoint
from sana_export.bench.stages import END_TO_END, STAGES

log = logging.getLogger(__name__)

#: Stages that together are the whole call, and their colours.
_PARTS = {"text_encoder": "#4e79a7", "context": "#76b7b2", "denoise_loop": "#f28e2b", "vae_decoder": "#59a14f"}
_LINES = ("#333333", "#e15759", "#4e79a7", "#59a14f", "#b07aa1", "#9c755f", "#f28e2b")
_SIZE = (7.2, 4.0)


def draw_plots(report: BenchReport, folder: Path) -> list[Path]:
    """stages, resolution, batch and ceiling as far as the report has them; returns their paths."""
    if importlib.util.find_spec("matplotlib") is None:
        log.warning('no plots: matplotlib is not installed (pip install "sana-export[bench]")')
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for name, draw in PLOTS.items():
        figure = Figure(figsize=_SIZE, dpi=120, layout="constrained")
        axes = figure.add_subplot()
        if not draw(report, axes):
            continue
        axes.spines[["top", "right"]].set_visible(False)
        if report.noisy:
            figure.suptitle("noisy run: the times mean little", fontsize=8, color="#b00020")
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}.png")
        FigureCanvasAgg(figure).print_png(str(paths[-1]))
    return paths


def _stages(report: BenchReport, axes: Any) -> bool:
    """A bar a backend, its parts one after the other."""
    shown = {name: result for name, result in report.backends.items() if result.stages}
    if not shown:
        return False
    names = list(reversed(shown))
    left = [0.0] * len(names)
    for stage, colour in _PARTS.items():
        widths = [shown[name].stages[stage].ms.median if stage in shown[name].stages else 0.0 for name in names]
        axes.barh(names, widths, left=left, color=colour, label=stage.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for index, name in enumerate(names):
        whole = shown[name].stages.get(END_TO_END)
        if whole is not None:
            axes.errorbar(
                whole.ms.median,
                index,
                xerr=[[whole.ms.median - whole.ms.p10], [whole.ms.p90 - whole.ms.median]],
                color="#333333",
                capsize=3,
            )
            faster = "" if shown[name].speedup is None else f"  {shown[name].speedup:.2f}x"
            axes.text(max(whole.ms.p90, left[index]), index, f"  {whole.ms.median:,.0f} ms{faster}", va="center", fontsize=8)
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds, median; the whisker is p10 to p90 of the whole call")
    axes.set_title(f"{report.bundle['source']}, {report.workload.height}x{report.workload.width}: where the time goes", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return True


def _points(report: BenchReport) -> list[SweepPoint]:
    return [SweepPoint(report.workload, report.backends), *report.sweep]


def _resolution(report: BenchReport, axes: Any) -> bool:
    """Latency against megapixels, at the workload's batch."""
    batch = report.workload.images_per_prompt
    points = [point for point in _points(report) if point.workload.images_per_prompt == batch]
    megapixels = [point.workload.height * point.workload.width / 1e6 for point in points]
    return _curves(
        report,
        axes,
        points,
        megapixels,
        [f"{point.workload.height}x{point.workload.width}" for point in points],
        "image size, by area",
        f"Latency against resolution, {batch} image(s) a call",
    )


def _batch(report: BenchReport, axes: Any) -> bool:
    """Latency against images a call, at the size that has most batches."""
    sizes: dict[tuple[int, int], list[SweepPoint]] = {}
    for point in _points(report):
        sizes.setdefault((point.workload.height, point.workload.width), []).append(point)
    (height, width), points = max(sizes.items(), key=lambda item: len({point.workload.images_per_prompt for point in item[1]}))
    batches = [point.workload.images_per_prompt for point in points]
    title = f"Latency against batch, {height}x{width}"
    return _curves(report, axes, points, batches, [str(batch) for batch in batches], "images in a call", title)


def _curves(
    report: BenchReport,
    axes: Any,
    points: Sequence[SweepPoint],
    places: Sequence[float],
    labels: Sequence[str],
    what: str,
    title: str,
) -> bool:
    """A line a backend through its medians, with p10 to p90 as whiskers; False where there is only one place."""
    if len(set(places)) < 2:
        return False
    order = sorted(range(len(points)), key=lambda index: places[index])
    for name in report.backends:
        found = [
            (places[index], points[index].backends[name].stages[END_TO_END].ms)
            for index in order
            if name in points[index].backends and END_TO_END in points[index].backends[name].stages
        ]
        if len(found) > 1:
            medians = [ms.median for _, ms in found]
            spread = [[ms.median - ms.p10 for _, ms in found], [ms.p90 - ms.median for _, ms in found]]
            axes.errorbar(
                [place for place, _ in found], medians, yerr=spread, marker="o", capsize=3, label=name, color=_colour(report, name)
            )
    axes.set_xticks([places[index] for index in order], [labels[index] for index in order], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(what)
    axes.set_ylabel("milliseconds end to end")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return True


def _colour(report: BenchReport, name: str) -> str:
    """A backend has one colour in all plots."""
    return _LINES[list(report.backends).index(name) % len(_LINES)]


def _ceiling(report: BenchReport, axes: Any) -> bool:
    """The share of the measured ceiling, a group of bars a stage."""
    stages = [stage for stage in STAGES if stage != "denoise_step"]
    shown = [name for name in report.backends if any(report.achieved(name, stage) for stage in stages)]
    if not shown:
        return False
    width = 0.8 / len(shown)
    for number, name in enumerate(shown):
        achieved = [report.achieved(name, stage) for stage in stages]
        heights = [0.0 if found is None else 100 * found.share for found in achieved]
        places = [index + (number - (len(shown) - 1) / 2) * width for index in range(len(stages))]
        bars = axes.bar(places, heights, width, label=name, color=_colour(report, name))
        axes.bar_label(bars, [f"{height:.0f}" if height else "" for height in heights], fontsize=7)
    axes.set_xticks(range(len(stages)), [stage.replace("_", " ") for stage in stages], fontsize=8)
    axes.set_ylabel("percent of the ceiling (floor / time)")
    axes.set_title("Share of the measured ceiling, each with its own work", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return True


#: Name of the file: what draws it into axes; False where the report lacks it.
PLOTS: dict[str, Callable[[BenchReport, Any], bool]] = {
    "stages": _stages,
    "resolution": _resolution,
    "batch": _batch,
    "ceiling": _ceiling,
}
