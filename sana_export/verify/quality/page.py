"""The measurement as one HTML page: figures, the distribution of PSNR, the worst images, and a row for each prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from sana_export import html_page
from sana_export.files import disk_errors, write_whole
from sana_export.formats.arrays import Array
from sana_export.machine import describe_machine, describe_versions
from sana_export.verify.quality.histogram import histogram
from sana_export.verify.quality.result import DIFFUSERS, Likeness, Quality, Sample, worst_first

PAGE_NAME = "quality.html"
#: Images that are shown side by side: those with a fault, up to so many, and as many of the others with the lowest PSNR.
SHOWN = 8
#: Longest side in pixels of an image on the page.
SIDE = 512
#: What differences are multiplied by, so that they can be seen.
AMPLIFIED = 8
_STYLE = """
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(9rem, 45%), 1fr)); gap: .5rem; margin: .3rem 0 1.2rem }
.row img { image-rendering: pixelated; border: 1px solid var(--line) } .row figcaption { color: var(--faint) }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--faint); font-size: 11px }
svg line { stroke: var(--strong) }
svg .limit { stroke-dasharray: 4 3 } svg .first { fill: var(--first) } svg .second { fill: var(--second) }
"""


def write_page(quality: Quality, folder: Path) -> Path:
    """Write `PAGE_NAME` into `folder`, whole or not at all, and return its path."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PAGE_NAME, page(quality))
    return folder / PAGE_NAME


def page(quality: Quality) -> str:
    """The page."""
    title = f"Image quality of {quality.bundle}"
    verdict = "All limits are met." if quality.passed else "NOT passed: a limit is missed."
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="conditions">{escape(line)}</p>' for line in _conditions(quality)),
        f'<p class="note{"" if quality.passed else " loud"}">{verdict}</p>',
        html_page.table(("", *(f"against {row.reference}" for row in quality.comparisons)), _figures(quality), 1),
        *(f"<p>{escape(note)}</p>" for note in _notes(quality)),
        "<h2>Distribution of PSNR</h2>",
        f'<div class="plots">{"".join(_histograms(quality))}</div>',
        "<h2>The worst images</h2>",
        f"<p>Images that fail by themselves, then those with the lowest PSNR against {escape(quality.comparisons[0].reference)}, "
        f"with the difference to it, amplified {AMPLIFIED} times. Black is equal.</p>",
        *(_side_by_side(quality, sample) for sample in shown_samples(quality.samples)),
        "<h2>Every prompt</h2>",
        html_page.table(_columns(quality), [_row(quality, sample) for sample in quality.samples], 1, lambda cells: cells[-1] != ""),
    ]
    return html_page.page(title, parts, _STYLE)


def shown_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The samples whose images the page shows."""
    ordered = worst_first(samples)
    faults = [sample for sample in ordered if sample.fault is not None]
    return [*faults[:SHOWN], *ordered[len(faults) : len(faults) + SHOWN]]


def amplified(image: Array, reference: Array) -> Array:
    """The absolute difference of two uint8 images, `AMPLIFIED` times and at most 255."""
    difference = np.abs(image.astype(np.int16) - reference.astype(np.int16))
    return np.minimum(AMPLIFIED * difference, 255).astype(np.uint8)


def _conditions(quality: Quality) -> list[str]:
    machine, versions = describe_machine(), describe_versions()
    height, width = quality.samples[0].image.shape[:2]
    return [
        f"{len(quality.samples)} prompts, one image each, {height}x{width} px, {quality.drawn.as_text()}.",
        f"{machine['cpu']}, {machine['cores']} cores; {machine['os']}; Python {machine['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]


def _figures(quality: Quality) -> list[list[str]]:
    """A row for each measure, with a cell for each comparison."""

    def cells(row: Likeness) -> dict[str, str]:
        top1 = None if row.top1 is None else f"{quality.top1:.1f} %, reference {row.top1:.1f} %"
        return {
            "PSNR, mean": f"{row.psnr_db.mean:.1f} dB" + ("" if quality.psnr_passes(row) else ", MISSED"),
            "PSNR, 5th percentile": f"{row.psnr_db.low:.1f} dB",
            "PSNR, worst": f"{row.psnr_db.worst:.1f} dB",
            "SSIM, mean": f"{row.ssim.mean:.4f}",
            "SSIM, 5th percentile": f"{row.ssim.low:.4f}",
            "SSIM, worst": f"{row.ssim.worst:.4f}",
            **({} if row.lpips is None else {"LPIPS, mean": f"{row.lpips[0]:.4f}", "LPIPS, worst": f"{row.lpips[1]:.4f}"}),
            **({} if top1 is None else {"top-1": top1 + ("" if quality.top1_passes(row) else ", MISSED")}),
        }

    columns = [cells(row) for row in quality.comparisons]
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _notes(quality: Quality) -> list[str]:
    limits = quality.limits
    mean = "" if limits.psnr_db is None else f"mean PSNR at least {limits.psnr_db:g} dB, "
    notes = [f"Limits: {mean}top-1 at most {limits.top1_points:.1f} points from each reference's, no blank or saturated image."]
    if quality.faults:
        notes.append(f"{len(quality.faults)} images fail by themselves.")
    if quality.renders_top1 is not None:
        notes.append(
            f"Top-1 of real renders: {quality.renders_top1:.1f} %. Reconstruction of the renders: "
            f"{quality.reconstruction_psnr_db:.2f} dB, diffusers {quality.reference_reconstruction_psnr_db:.2f} dB."
        )
    return notes + ([f"LPIPS: not measured, because {quality.lpips_missing}."] if quality.lpips_missing else [])


def _histograms(quality: Quality) -> list[str]:
    """One for each comparison, with the same axis."""
    values = [[sample.psnr_db[index] for sample in quality.samples] for index in range(len(quality.comparisons))]
    return [
        f"<figure>{histogram(own, values, quality.limits.psnr_db, kind)}"
        f"<figcaption>PSNR in dB against {escape(row.reference)}</figcaption></figure>"
        for own, row, kind in zip(values, quality.comparisons, ("first", "second"), strict=False)
    ]


def _side_by_side(quality: Quality, sample: Sample) -> str:
    """diffusers, the other bundle, this bundle, and the difference to the first reference."""
    named = [(row.reference, image) for row, image in zip(quality.comparisons, sample.references, strict=True)]
    named = [*reversed(named), (f"{quality.bundle} (measured)", sample.image), ("difference", amplified(sample.image, named[0][1]))]
    figures = "".join(
        f'<figure><img src="{_source(image)}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, image in named
    )
    numbers = ", ".join(f"{ratio:.1f} dB against {name}" for ratio, name in zip(sample.psnr_db, _short_names(quality), strict=True))
    fault = "" if sample.fault is None else f"; <b>{escape(sample.fault)}</b>"
    head = f"<b>{escape(sample.prompt) or '(empty prompt)'}</b> seed {sample.seed}, image {sample.place + 1}: {numbers}{fault}"
    return f'<div>{head}</div><div class="row">{figures}</div>'


def _source(pixels: Array) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return html_page.png_source(file.getvalue())


def _columns(quality: Quality) -> list[str]:
    measures = [f"{measure} against {name}" for name in _short_names(quality) for measure in ("dB", "SSIM")]
    return ["prompt", "seed", "image", *measures, *(["recognized"] if quality.top1 is not None else []), "fault"]


def _short_names(quality: Quality) -> list[str]:
    return ["diffusers" if row.reference == DIFFUSERS else "the bundle" for row in quality.comparisons]


def _row(quality: Quality, sample: Sample) -> list[str]:
    pairs = zip(sample.psnr_db, sample.ssim, strict=True)
    numbers = [text for ratio, likeness in pairs for text in (f"{ratio:.1f}", f"{likeness:.4f}")]
    recognized = [] if quality.top1 is None else ["yes" if sample.recognized else "NO"]
    return [sample.prompt, str(sample.seed), str(sample.place + 1), *numbers, *recognized, sample.fault or ""]
