"""The report as one HTML page that needs no other file: images and plots are embedded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from sana_export import html_page
from sana_export.bench.report.result import BenchReport
from sana_export.bench.report.text import (
    SWEEP_COLUMNS,
    backend_note,
    ceiling_notes,
    columns,
    conditions,
    likeness,
    noise_note,
    stage_rows,
    sweep_rows,
    title,
)
from sana_export.bench.stages import END_TO_END

_STYLE = """
.images { display: flex; flex-wrap: wrap; gap: 1rem } .images figure { width: 20rem } .plots img { width: 100%; display: block }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem }
"""


def page(report: BenchReport, images: Mapping[str, Path], plots: Sequence[Path]) -> str:
    """The page. `images` (backend to path) and `plots` are PNG files, which it embeds."""
    loud = " loud" if report.noisy else ""
    parts = [
        f"<h1>{escape(title(report))}</h1>",
        *(f'<p class="conditions">{escape(line)}</p>' for line in conditions(report)),
        f'<p class="note{loud}">{escape(noise_note(report))}</p>',
        "<h2>The same image</h2>" if images else "",
        f'<div class="images">{"".join(_figure(report, backend, path) for backend, path in images.items())}</div>',
        "<h2>Times</h2>",
        html_page.table(columns(), stage_rows(report), 2, lambda cells: cells[0] == END_TO_END),
        "<ul>",
        *(f"<li><b>{escape(key)}</b>: {escape(backend_note(result))}</li>" for key, result in report.backends.items()),
        *(f"<li>{escape(note)}</li>" for note in ceiling_notes(report)),
        "</ul>",
    ]
    if report.sweep:
        parts += ["<h2>Other sizes and batches</h2>", html_page.table(SWEEP_COLUMNS, sweep_rows(report), 3)]
    if plots:
        drawn = "".join(f'<img src="{_inline(path)}" alt="{escape(path.stem)}">' for path in plots)
        parts += ["<h2>Plots</h2>", f'<div class="plots">{drawn}</div>']
    return html_page.page(title(report), parts, _STYLE)


def _figure(report: BenchReport, backend: str, path: Path) -> str:
    result = report.backends[backend]
    lines = [f"<b>{escape(backend)}</b>"]
    if (whole := result.stages.get(END_TO_END)) is not None:
        lines.append(
            f"{whole.ms.median:,.0f} ms" + ("" if result.speedup is None else f", {result.speedup:.2f} times as fast as eager")
        )
    if (agreement := result.agreement) is not None:
        lines.append(f"{likeness(agreement)} against eager: {'agrees' if agreement.agrees else 'DOES NOT AGREE'}")
    return f'<figure><img src="{_inline(path)}" alt="{escape(backend)}"><figcaption>{"<br>".join(lines)}</figcaption></figure>'


def _inline(path: Path) -> str:
    return html_page.png_source(path.read_bytes())
