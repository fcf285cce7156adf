"""The report as one HTML page that needs no other file: images and plots are embedded."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

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
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p.conditions { color: #555; font-size: .85rem; margin: .2rem 0 }
.noise { padding: .4rem .7rem; border-radius: .3rem; background: #e8f3e8 } .noise.loud { background: #fbe3e4; font-weight: 600 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right } th { border-bottom: 2px solid #999 }
td.text, th.text { text-align: left }
tr.whole td { font-weight: 600; background: #f6f6f6 }
.images { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; width: 20rem; max-width: 100% }
figure img, .plots img { width: 100%; height: auto; display: block } figcaption { font-size: .85rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
"""


def page(report: BenchReport, images: Mapping[str, Path], plots: Sequence[Path]) -> str:
    """The page. `images` (backend to path) and `plots` are PNG files, which it embeds."""
    name = escape(title(report))
    loud = " loud" if report.noisy else ""
    parts = [
        f"<h1>{name}</h1>",
        *(f'<p class="conditions">{escape(line)}</p>' for line in conditions(report)),
        f'<p class="noise{loud}">{escape(noise_note(report))}</p>',
        "<h2>The same image</h2>" if images else "",
        f'<div class="images">{"".join(_figure(report, backend, path) for backend, path in images.items())}</div>',
        "<h2>Times</h2>",
        _table(columns(), stage_rows(report), text_columns=2),
        "<ul>",
        *(f"<li><b>{escape(key)}</b>: {escape(backend_note(result))}</li>" for key, result in report.backends.items()),
        *(f"<li>{escape(note)}</li>" for note in ceiling_notes(report)),
        "</ul>",
    ]
    if report.sweep:
        parts += ["<h2>Other sizes and batches</h2>", _table(SWEEP_COLUMNS, sweep_rows(report), text_columns=3)]
    if plots:
        drawn = "".join(f'<img src="{_inline(path)}" alt="{escape(path.stem)}">' for path in plots)
        parts += ["<h2>Plots</h2>", f'<div class="plots">{drawn}</div>']
    body = "\n".join(filter(None, parts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        marked_up = (
            f"<{kind}{' class=text' if index < text_columns else ''}>{escape(cell)}</{kind}>" for index, cell in enumerate(cells)
        )
        return f"<tr{' class=whole' if cells[0] == END_TO_END else ''}>{''.join(marked_up)}</tr>"

    return f"<table><thead>{row(header, 'th')}</thead><tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
