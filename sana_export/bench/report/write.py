"""Writes a report to a folder: JSON, Markdown, one HTML page, images and plots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sana_export.bench.report.document import document
from sana_export.bench.report.html import page
from sana_export.bench.report.plots import draw_plots
from sana_export.bench.report.result import BenchReport
from sana_export.bench.report.text import markdown
from sana_export.files import write_whole

JSON_NAME, TEXT_NAME, PAGE_NAME = "bench.json", "bench.md", "bench.html"
IMAGES, PLOTS = "images", "plots"


def write_report(report: BenchReport, folder: Path) -> list[Path]:
    """Write bench.json, bench.md, bench.html, images/ and, if matplotlib is installed, plots/ into `folder`.

    The three files are written whole or not at all. Returns the paths of all files, bench.json first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = _write_images(report, folder / IMAGES)
    plots = draw_plots(report, folder / PLOTS)
    content = {
        JSON_NAME: json.dumps(document(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        TEXT_NAME: markdown(report),
        PAGE_NAME: page(report, images, plots),
    }
    for name, text in content.items():
        write_whole(folder / name, text)
    return [*(folder / name for name in content), *images.values(), *plots]


def _write_images(report: BenchReport, folder: Path) -> dict[str, Path]:
    """Write the first image of each backend as PNG; returns backend to path."""
    paths = {}
    for name, pixels in report.images.items():
        folder.mkdir(exist_ok=True)
        paths[name] = folder / f"{name.replace(':', '-')}.png"
        Image.fromarray(np.asarray(pixels[0], np.uint8)).save(paths[name])
    return paths
