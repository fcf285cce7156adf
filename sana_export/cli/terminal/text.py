"""Formats numbers and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size(count: int | float) -> str:
    """Bytes in decimal units: 1234567 is "1.2 MB"."""
    for unit in _UNITS:
        if abs(count) < 999.5 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == _UNITS[0] or abs(count) >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def seconds(value: float) -> str:
    """A duration: "35 ms", "12.3 s", "2 min 05 s"."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = (), indent: str = "") -> str:
    """Columns of text, left-aligned and two spaces apart."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join((indent + line).rstrip() for line in lines)


def plural(count: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
