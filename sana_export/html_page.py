"""Parts of an HTML page that needs no other file. It adapts to narrow screens and to dark mode."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape

#: What all pages share. Colors are variables, so that dark mode replaces them in one place.
STYLE = """
:root { color-scheme: light dark; --text: #222; --faint: #555; --back: #fff; --line: #ddd; --strong: #999; --row: #f6f6f6;
  --good: #e8f3e8; --bad: #fbe3e4; --first: #2f6fb0; --second: #c2701c }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4; --faint: #a8a8a8; --back: #17181a; --line: #3a3c40; --strong: #777;
  --row: #232528; --good: #1d3524; --bad: #4d2226; --first: #6aa9e9; --second: #e79b4d } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p.conditions { color: var(--faint); font-size: .85rem; margin: .2rem 0 }
.note { padding: .4rem .7rem; border-radius: .3rem; background: var(--good) }
.note.loud { background: var(--bad); font-weight: 600 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th { border-bottom: 2px solid var(--strong) }
td.text, th.text { text-align: left }
tr.marked td { font-weight: 600; background: var(--row) }
figure { margin: 0; max-width: 100% } figure img { width: 100%; height: auto; display: block } figcaption { font-size: .85rem }
"""


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page of `parts`, which are HTML; empty ones are left out. `title` is text. `style` is CSS besides `STYLE`."""
    body = "\n".join(filter(None, parts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: int,
    marked: Callable[[Sequence[str]], bool] = lambda cells: False,
) -> str:
    """A table of text that scrolls if it is too wide. The first `text_columns` are aligned left. Some rows are `marked`."""

    def row(cells: Sequence[str], kind: str) -> str:
        marked_up = (
            f"<{kind}{' class=text' if index < text_columns else ''}>{escape(cell)}</{kind}>" for index, cell in enumerate(cells)
        )
        return f"<tr{' class=marked' if marked(cells) else ''}>{''.join(marked_up)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def png_source(content: bytes) -> str:
    """A PNG file as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
