"""The page in a real browser, and the plots as images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_export.bench.report.plots import PLOTS
from sana_export.bench.report.result import Agreement, BackendResult, BenchReport, SweepPoint
from sana_export.bench.report.write import write_report
from sana_export.bench.stages import StageResult, Summary
from sana_export.bench.work.count import Product, Rates, Work
from sana_export.bench.workload import Workload

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: What each backend draws: one color that nothing else on the page uses.
COLORS = {"eager": (255, 0, 200), "onnxruntime": (0, 255, 90), "own:backend": (255, 120, 0)}
WORK = Workload("page", 512, 512, 4, 4.5, ("a 🐼 & <b>",), sweep=({"height": 256, "width": 256}, {"images_per_prompt": 2}))
STAGES = ("text_encoder", "context", "denoise_loop", "vae_decoder", "end_to_end")


def result(name: str, ms: float) -> BackendResult:
    ratio = None if name == "eager" else Summary(3, 400 / ms, 1.0, 2.0)
    stages = {stage: StageResult(Summary(3, ms, 0.95 * ms, 1.05 * ms), ms, ratio) for stage in STAGES}
    agreement = None if name == "eager" else Agreement(80.0, 60.0)
    return BackendResult(name, f"what {name} is", None, 1.0, 1 << 28, None, stages, agreement, work="bundle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backends = {name: result(name, ms) for name, ms in zip(COLORS, (400.0, 200.0, 300.0), strict=True)}
    work = Work.of([Product("", "MatMul", 10**10, 10**8)])
    report = BenchReport(
        created="2030-01-02T03:04:05+00:00",
        machine={"cpu": "a cpu", "cores": 2, "memory": 8 << 30, "gpu": [], "os": "Linux", "python": "3.11.7"},
        versions={"sana_export": "0.1.0"},
        bundle={"source": "tiny <&>", "synthetic": True, "precision": "fp32", "clamp": False, "pag_layers": [], "export_key": "a"},
        workload=WORK,
        threads=2,
        other_load=0.0,
        backends=backends,
        rates=Rates(1e12, 1e10, "fp32", "made up"),
        work={"bundle": dict.fromkeys(STAGES, work)},
        sweep=[SweepPoint(point, {name: result(name, 100.0) for name in COLORS}) for point in WORK.points()],
        images={name: np.full((1, 64, 64, 3), color, np.uint8) for name, color in COLORS.items()},
    )
    folder = tmp_path_factory.mktemp("page")
    write_report(report, folder)
    return folder


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"no browser: install one of {', '.join(BROWSERS)} (.ci/run does on Debian)")
    if found is None:
        pytest.skip("no browser is installed (apt-get install chromium)")
    return found


def test_a_browser_shows_the_images_side_by_side(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "elsewhere" / "page.html"  # alone: it must not need other files
    page.parent.mkdir()
    shutil.copy(folder / "bench.html", page)
    shot = tmp_path / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,3000"]
    command = [browser(), *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as opened:
        pixels = np.asarray(opened.convert("RGB"), np.int16)
    places = []
    for color in COLORS.values():
        rows, columns = np.nonzero((np.abs(pixels - np.array(color)) < 4).all(-1))
        assert len(rows) > 200 * 200, f"{color} is not shown"
        places.append((rows.min(), rows.max(), columns.min(), columns.max()))
    assert len({(top, bottom) for top, bottom, *_ in places}) == 1
    assert all(left[3] < right[2] for left, right in pairwise(places))
    # Below the images are the plots with their colors.
    below = pixels[places[0][1] :]
    assert ((np.abs(below - np.array((242, 142, 43))) < 6).all(-1)).sum() > 500  # the denoiser's part of the bars


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "bench.html").read_text("utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == len(COLORS) + len(PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "tiny &lt;&amp;&gt;" in text
    assert "<&>" not in text
    assert "2.00 times as fast as eager" in text


def test_every_plot_that_the_report_has_data_for_is_drawn(folder: Path) -> None:
    assert {path.stem for path in (folder / "plots").iterdir()} == set(PLOTS)
    for path in (folder / "plots").iterdir():
        with Image.open(path) as opened:
            assert len(np.unique(np.asarray(opened.convert("RGB")).reshape(-1, 3), axis=0)) > 20  # not blank
