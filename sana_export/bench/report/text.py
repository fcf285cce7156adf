"""The report as Markdown."""

from __future__ import annotations

import math

from sana_export.bench.candidates.table import BASELINE
from sana_export.bench.report.result import Agreement, BackendResult, BenchReport
from sana_export.bench.stages import END_TO_END, STAGES, StageResult
from sana_export.bench.work.count import BUNDLE, REFERENCE, Achieved

_COLUMNS = (
    *("stage", "backend", "n", "median ms", "p10 to p90", "first call", "times as fast as eager (p10 to p90)"),
    *("TFLOP/s", "GB/s", "of the ceiling"),
)


def markdown(report: BenchReport) -> str:
    """The conditions, a row for each stage and backend, notes, then the sweep."""
    return "\n".join([*_heading(report), "", *_table(report), "", *_notes(report), *_sweep(report)]) + "\n"


def title(report: BenchReport) -> str:
    """What was timed, in one line."""
    synthetic = " (synthetic weights)" if report.bundle["synthetic"] else ""
    return f"{report.bundle['source']}{synthetic}: {report.workload.name}"


def conditions(report: BenchReport) -> list[str]:
    """How it was timed and on which machine: two lines."""
    work, machine = report.workload, report.machine
    gpu = f", {', '.join(machine['gpu'])}" if machine["gpu"] else ""
    guidance = f"guidance {work.guidance_scale:g}" + (f", PAG {work.pag_scale:g}" if work.pag_scale else "")
    images = f"{_count(len(work.prompts), 'prompt')}, {_count(work.images_per_prompt, 'image')} per call"
    return [
        f"{work.height}x{work.width} px, {work.num_inference_steps} steps, {guidance}; {images}; {work.warmup} warm-up and "
        f"{work.repeats} counted rounds, in turn; {_count(report.threads, 'thread')}.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB{gpu}; {machine['os']}; "
        f"Python {machine['python']}, {', '.join(f'{name} {version}' for name, version in report.versions.items())}.",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def stage_cells(stage: str, name: str, measured: StageResult, achieved: Achieved | None) -> tuple[str, ...]:
    """One row of the table, in the order of `columns`."""
    ms, ratio = measured.ms, measured.ratio
    return (
        *(stage, name, str(ms.n), f"{ms.median:.1f}", f"{ms.p10:.1f} to {ms.p90:.1f}"),
        "" if measured.first_ms is None else f"{measured.first_ms:.1f}",
        "" if ratio is None else f"{ratio.median:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})",
        "" if achieved is None else f"{achieved.tflops:.3g}",
        "" if achieved is None else f"{achieved.gbs:.3g}",
        "" if achieved is None else f"{achieved.share:.0%}",
    )


def stage_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """A row for each stage and backend that has it."""
    return [
        stage_cells(stage, name, measured, report.achieved(name, stage))
        for stage in STAGES
        for name, result in report.backends.items()
        if (measured := result.stages.get(stage)) is not None
    ]


def columns() -> tuple[str, ...]:
    """The headings of `stage_rows`."""
    return _COLUMNS


def backend_note(result: BackendResult) -> str:
    """What ran, with its memory, power and agreement; or why it did not run."""
    if result.failed is not None:
        return ("skipped: " if result.skipped else "FAILED: ") + " ".join(result.failed.split())
    parts = [result.description]
    if result.load_seconds is not None:
        parts.append(f"loaded in {result.load_seconds:.1f} s")
    for what, amount in (("memory", result.peak_rss_bytes), ("device memory", result.peak_device_bytes)):
        if amount is not None:
            parts.append(f"peak {what} {amount / 2**20:.0f} MiB")
    if (gpu := result.gpu) is not None:
        for key, unit in (("power_w", "W"), ("sm_clock_mhz", "MHz")):
            if gpu[key] is not None:
                parts.append(f"{gpu[key]['median']:.0f} {unit} ({gpu[key]['min']:.0f} to {gpu[key]['max']:.0f})")
        if gpu["slowed_by"]:
            parts.append(f"slowed by {', '.join(gpu['slowed_by'])}")
    if (agreement := result.agreement) is not None:
        verdict = "agrees" if agreement.agrees else "DOES NOT AGREE, so its times do not count"
        parts.append(f"image {likeness(agreement)} against {BASELINE} (limit {agreement.limit_db:g}): {verdict}")
    return ", ".join(parts)


def likeness(agreement: Agreement) -> str:
    """The PSNR in dB, or "identical"."""
    return "identical" if agreement.psnr_db == math.inf else f"{agreement.psnr_db:.1f} dB"


def ceiling_notes(report: BenchReport) -> list[str]:
    """The measured ceiling, and the floor of the whole call that follows from it."""
    if (rates := report.rates) is None:
        return []
    notes = [f"ceiling, {rates.source}: {rates.flop / 1e12:.3g} TFLOP/s in {rates.precision}, copy {rates.bytes / 1e9:.3g} GB/s"]
    for whose, of in ((BUNDLE, "our graphs"), (REFERENCE, "diffusers' modules")):
        if (floor := report.floor_ms(whose, END_TO_END)) is not None:
            flop = report.work[whose][END_TO_END].flop / len(report.workload.prompts)
            notes.append(f"floor of the whole call with the work of {of}: {floor:.1f} ms, {flop / 1e12:.3g} TFLOP")
    return notes


def noise_note(report: BenchReport) -> str:
    """Whether the times are reliable."""
    if report.noisy:
        return f"NOISY, the times are unreliable: {'; '.join(report.noise)}"
    load = "" if report.other_load is None else f", other processes used {report.other_load:.0%} of the cores"
    return f"quiet: the end-to-end times are close together{load}"


def sweep_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """The cells of `SWEEP_COLUMNS` for each point and backend; the reason if it failed there."""
    rows: list[tuple[str, ...]] = []
    for point in report.sweep:
        work = point.workload
        for name, result in point.backends.items():
            head = (f"{work.height}x{work.width}", str(work.images_per_prompt), name)
            if (whole := result.stages.get(END_TO_END)) is None:
                rows.append((*head, "", " ".join((result.failed or "").split()), "", "", ""))
                continue
            ms, memory = whole.ms, result.peak_device_bytes or result.peak_rss_bytes or 0
            faster = "" if result.speedup is None else f"{result.speedup:.2f}"
            rows.append((*head, str(ms.n), f"{ms.median:.1f}", f"{ms.p10:.1f} to {ms.p90:.1f}", faster, f"{memory / 2**20:.0f}"))
    return rows


SWEEP_COLUMNS = ("size", "images", "backend", "n", "end to end, median ms", "p10 to p90", "times as fast as eager", "peak MiB")


def _heading(report: BenchReport) -> list[str]:
    return [f"# {title(report)}", "", *conditions(report)]


def _table(report: BenchReport) -> list[str]:
    return _markdown_table(_COLUMNS, stage_rows(report), text_columns=2)


def _notes(report: BenchReport) -> list[str]:
    notes = [f"{name}: {backend_note(result)}" for name, result in report.backends.items()]
    return [f"- {note}" for note in (*notes, *ceiling_notes(report), noise_note(report))]


def _sweep(report: BenchReport) -> list[str]:
    rows = sweep_rows(report)
    return ["", *_markdown_table(SWEEP_COLUMNS, rows, text_columns=3)] if rows else []


def _markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]], text_columns: int) -> list[str]:
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]
