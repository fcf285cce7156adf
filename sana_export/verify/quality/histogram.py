"""A histogram as inline SVG, whose colors come from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Size of the drawing; the page scales it.
WIDTH, HEIGHT = 480, 190
#: Space for labels at the left, right, top and bottom.
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 18, 24
#: About how many bars the axis has.
BARS = 25
#: What values above it count as: equal images have no finite PSNR.
MOST = 100.0
_STEPS = (0.5, 1, 2, 4, 5, 10)


def histogram(values: Sequence[float], axis: Sequence[Sequence[float]], limit: float | None, kind: str) -> str:
    """Bars of how many `values` (dB) are in each bin. The axis covers all of `axis` and `limit`, a dashed line at its place.

    `kind` is the CSS class of the bars. Values beyond `MOST` are in the last bin, and those that are not finite below in the first.
    """
    every = [_clipped(value) for own in axis for value in own] + ([] if limit is None else [limit])
    step = next((step for step in _STEPS if (max(every) - min(every)) / step <= BARS), _STEPS[-1])
    first, last = step * math.floor(min(every) / step), step * (math.floor(max(every) / step) + 1)
    edges = np.arange(round((last - first) / step) + 1) * step + first
    counts = np.histogram([_clipped(value) for value in values], edges)[0]
    across, up = (WIDTH - LEFT - RIGHT) / (last - first), (HEIGHT - TOP - BOTTOM) / max(counts.max(), 1)
    base = HEIGHT - BOTTOM
    parts = []
    for edge, count in zip(edges[:-1], counts, strict=True):
        x, width = LEFT + (edge - first) * across + 1, step * across - 2
        title = f"<title>{count} images from {edge:g} to {edge + step:g} dB</title>"
        bar = f'x="{x:.1f}" y="{base - count * up:.1f}" width="{width:.1f}" height="{count * up:.1f}"'
        parts += [f'<rect class="{kind}" {bar}>{title}</rect>'] if count else []
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    every_other = max(1, math.ceil(len(edges) / 8))
    parts += [
        f'<text x="{LEFT + (edge - first) * across:.1f}" y="{base + 16}" text-anchor="middle">{edge:g}</text>'
        for edge in edges[::every_other]
    ]
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{counts.max()}</text>')
    if limit is not None:
        x = f"{LEFT + (limit - first) * across:.1f}"
        parts.append(f'<line class="limit" x1="{x}" x2="{x}" y1="{TOP}" y2="{base}"/>')
        anchor = "start" if limit < (first + last) / 2 else "end"
        parts.append(f'<text x="{x}" y="{TOP - 6}" text-anchor="{anchor}">limit of the mean</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _clipped(value: float) -> float:
    """`value` from 0 to `MOST`."""
    return min(max(value, 0.0), MOST)
