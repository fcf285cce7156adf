"""What a load has shown, as one JSON document and as a table."""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from benchmarks.serve.images import Rate
from benchmarks.serve.traffic import Outcome
from sana_export.machine import describe_machine

#: Verdicts of requests that got what they had to get.
FINE = ("ok", "busy")


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and settings."""
    packages = ("onnxruntime", "fastapi", "uvicorn", "httpx")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": {name: version(name) for name in packages},
        "bundle": args.bundle.name,
        **{
            name: getattr(args, name)
            for name in ("clients", "rate", "seconds", "rounds", "mix", "size", "steps", "batch", "threads")
        },
        "server_options": args.server_options,
    }


def summary(
    rates: Sequence[tuple[Rate, Rate]], outcomes: Sequence[Outcome], memory: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """The figures of all rounds together. Ratios are medians of the rounds' own."""
    failed = [outcome for outcome in outcomes if outcome.verdict not in FINE]
    seconds = sorted(outcome.seconds for outcome in outcomes if outcome.kind == "valid" and outcome.status == 200)
    return {
        "requests": dict(Counter(outcome.kind for outcome in outcomes)),
        "images": sum(served.images for _, served in rates),
        "images_per_second": _total(rates, 1, lambda rate: rate.seconds, inverse=True),
        "bare_images_per_second": _total(rates, 0, lambda rate: rate.seconds, inverse=True),
        "throughput_ratio": statistics.median(_speed(served) / _speed(bare) for bare, served in rates),
        "undisturbed_ratio": statistics.median(_undisturbed(served) / _undisturbed(bare) for bare, served in rates),
        "cpu_ms_per_image": _total(rates, 1, lambda rate: 1000 * rate.cpu_seconds),
        "bare_cpu_ms_per_image": _total(rates, 0, lambda rate: 1000 * rate.cpu_seconds),
        "p50_seconds": quantile(seconds, 0.5),
        "p99_seconds": quantile(seconds, 0.99),
        "statuses": {str(status): count for status, count in sorted(Counter(outcome.status for outcome in outcomes).items())},
        "busy": sum(outcome.verdict == "busy" for outcome in outcomes),
        "lost": sum(outcome.verdict == "lost" for outcome in outcomes),
        "crossed": sum(outcome.verdict == "crossed" for outcome in outcomes),
        "differs": sum(outcome.verdict == "differs" for outcome in outcomes),
        "failures": len(failed),
        "examples": sorted({outcome.detail for outcome in failed})[:10],
        "memory_mib": _memory(memory),
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The value that `share` of the ordered values do not exceed."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def _speed(rate: Rate) -> float:
    return rate.images / rate.seconds


def _undisturbed(rate: Rate) -> float:
    """Without the time in which other programs kept the thread that draws from going on. What they cost other threads is in it."""
    return rate.images / (rate.seconds - rate.waited)


def _total(
    rates: Sequence[tuple[Rate, Rate]], which: int, value: Callable[[Rate], float], *, inverse: bool = False
) -> float | None:
    """The sum of a value over all rounds, for each image; or with `inverse`, images for each of it."""
    images = sum(pair[which].images for pair in rates)
    total = sum(value(pair[which]) for pair in rates)
    if not images or not total:
        return None
    return images / total if inverse else total / images


def _memory(samples: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Resident memory: at the start, the medians of the second and the last quarter of the time, and the most."""
    if not samples:
        return None
    quarter = max(len(samples) // 4, 1)
    values = [value for _, value in samples]
    return {
        "first": values[0],
        "second_quarter": statistics.median(values[quarter : 2 * quarter] or values),
        "last_quarter": statistics.median(values[-quarter:]),
        "most": max(values),
        "samples": [[round(time, 1), round(value, 1)] for time, value in samples[:: max(len(samples) // 60, 1)]],
    }


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


#: The columns of the table: their heads, and what they show of a result.
COLUMNS: Mapping[str, Callable[[dict[str, Any], dict[str, Any]], str]] = {
    "load": lambda c, s: f"{c['clients']} clients" if c["clients"] else f"{c['rate']:g} a second",
    "requests": lambda c, s: str(sum(s["requests"].values())),
    "images": lambda c, s: str(s["images"]),
    "images/s": lambda c, s: _number(s["images_per_second"]),
    "bare": lambda c, s: _number(s["bare_images_per_second"]),
    "of bare": lambda c, s: _number(s["throughput_ratio"], ".0%"),
    "undisturbed": lambda c, s: _number(s["undisturbed_ratio"], ".0%"),
    "CPU ms/image": lambda c, s: _number(s["cpu_ms_per_image"], ".1f"),
    "bare CPU": lambda c, s: _number(s["bare_cpu_ms_per_image"], ".1f"),
    "p50 s": lambda c, s: _number(s["p50_seconds"]),
    "p99 s": lambda c, s: _number(s["p99_seconds"]),
    "429": lambda c, s: str(s["statuses"].get("429", 0)),
    "lost": lambda c, s: str(s["lost"]),
    "crossed": lambda c, s: str(s["crossed"] + s["differs"]),
    "other failures": lambda c, s: str(s["failures"] - s["lost"] - s["crossed"] - s["differs"]),
    "MiB": lambda c, s: _mib(s["memory_mib"]),
}


def _mib(memory: dict[str, Any] | None) -> str:
    return f"{memory['second_quarter']:.0f} to {memory['last_quarter']:.0f}" if memory else ""


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each result. MiB: resident memory of the server, in the second and in the last quarter of the time."""
    rows = [[show(result["conditions"], result["summary"]) for show in COLUMNS.values()] for result in results]
    lines = [list(COLUMNS), ["---"] + ["---:"] * (len(COLUMNS) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
