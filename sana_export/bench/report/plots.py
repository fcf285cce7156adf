"""The report's plots as PNG files. They need matplotlib (extra `bench`)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sana_export.bench.report.result import BenchReport, SweepPoint
from sana_export.bench.stages import END_TO_END, STAGES
from sana_export.installation import install_command

log = logging.getLogger(__name__)

#: The stages that make up the whole call, and their colors.
_PARTS = {"text_encoder": "#4e79a7", "context": "#76b7b2", "denoise_loop": "#f28e2b", "vae_decoder": "#59a14f"}
_LINES = ("#333333", "#e15759", "#4e79a7", "#59a14f", "#b07aa1", "#9c755f", "#f28e2b")
_SIZE = (7.2, 4.0)


def draw_plots(report: BenchReport, folder: Path) -> list[Path]:
    """Draw those of `PLOTS` that the report has data for; returns their paths."""
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no plots: matplotlib is not installed (%s)", install_command("bench"))
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
            figure.suptitle("noisy run: the times are unreliable", fontsize=8, color="#b00020")
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}.png")
        FigureCanvasAgg(figure).print_png(str(paths[-1]))
    return paths


def _stages(report: BenchReport, axes: Any) -> bool:
    """A bar for each backend, its stages one after the other."""
    shown = {name: result for name, result in report.backends.items() if result.stages}
    if not shown:
        return False
    names = list(reversed(shown))
    left = [0.0] * len(names)
    for stage, color in _PARTS.items():
        widths = [shown[name].stages[stage].ms.median if stage in shown[name].stages else 0.0 for name in names]
        axes.barh(names, widths, left=left, color=color, label=stage.replace("_", " "))
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
    axes.set_title(f"{report.bundle['source']}, {report.workload.height}x{report.workload.width}: time by stage", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return True


def _points(report: BenchReport) -> list[SweepPoint]:
    return [SweepPoint(report.workload, report.backends), *report.sweep]


def _resolution(report: BenchReport, axes: Any) -> bool:
    """Latency by megapixels, at the workload's batch."""
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
        f"Latency by resolution, images per call: {batch}",
    )


def _batch(report: BenchReport, axes: Any) -> bool:
    """Latency by images per call, at the size with the most batches."""
    sizes: dict[tuple[int, int], list[SweepPoint]] = {}
    for point in _points(report):
        sizes.setdefault((point.workload.height, point.workload.width), []).append(point)
    (height, width), points = max(sizes.items(), key=lambda item: len({point.workload.images_per_prompt for point in item[1]}))
    batches = [point.workload.images_per_prompt for point in points]
    title = f"Latency by batch, {height}x{width}"
    return _curves(report, axes, points, batches, [str(batch) for batch in batches], "images per call", title)


def _curves(
    report: BenchReport,
    axes: Any,
    points: Sequence[SweepPoint],
    positions: Sequence[float],
    labels: Sequence[str],
    what: str,
    title: str,
) -> bool:
    """A line for each backend through its medians, with p10 to p90 as whiskers. False if there is only one point."""
    if len(set(positions)) < 2:
        return False
    order = sorted(range(len(points)), key=lambda index: positions[index])
    for name in report.backends:
        found = [
            (positions[index], points[index].backends[name].stages[END_TO_END].ms)
            for index in order
            if name in points[index].backends and END_TO_END in points[index].backends[name].stages
        ]
        if len(found) > 1:
            medians = [ms.median for _, ms in found]
            spread = [[ms.median - ms.p10 for _, ms in found], [ms.p90 - ms.median for _, ms in found]]
            axes.errorbar(
                [position for position, _ in found],
                medians,
                yerr=spread,
                marker="o",
                capsize=3,
                label=name,
                color=_color(report, name),
            )
    axes.set_xticks([positions[index] for index in order], [labels[index] for index in order], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(what)
    axes.set_ylabel("milliseconds end to end")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return True


def _color(report: BenchReport, name: str) -> str:
    """The backend's color, the same in all plots."""
    return _LINES[list(report.backends).index(name) % len(_LINES)]


def _ceiling(report: BenchReport, axes: Any) -> bool:
    """The share of the measured ceiling, a group of bars for each stage."""
    stages = [stage for stage in STAGES if stage != "denoise_step"]
    shown = [name for name in report.backends if any(report.achieved(name, stage) for stage in stages)]
    if not shown:
        return False
    width = 0.8 / len(shown)
    for number, name in enumerate(shown):
        achieved = [report.achieved(name, stage) for stage in stages]
        heights = [0.0 if found is None else 100 * found.share for found in achieved]
        positions = [index + (number - (len(shown) - 1) / 2) * width for index in range(len(stages))]
        bars = axes.bar(positions, heights, width, label=name, color=_color(report, name))
        axes.bar_label(bars, [f"{height:.0f}" if height else "" for height in heights], fontsize=7)
    axes.set_xticks(range(len(stages)), [stage.replace("_", " ") for stage in stages], fontsize=8)
    axes.set_ylabel("percent of the ceiling (floor / time)")
    axes.set_title("Share of the measured ceiling, for each backend's own work", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return True


#: Name of the file to the function that draws it. The function returns False if the report has no data for it.
PLOTS: dict[str, Callable[[BenchReport, Any], bool]] = {
    "stages": _stages,
    "resolution": _resolution,
    "batch": _batch,
    "ceiling": _ceiling,
}
