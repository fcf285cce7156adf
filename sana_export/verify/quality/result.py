"""What was measured about the quality of a bundle's images, with its limits, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sana_export.formats.arrays import Array
from sana_export.json_records import json_value
from sana_export.quantization.schemes import SCHEMES
from sana_export.verify.quality.meter import FOLDER

#: The name of the reference that every bundle is compared with.
DIFFUSERS = "diffusers in fp32"
#: Largest allowed difference between the top-1 of a bundle without quantization and of a reference, in percentage points.
TOP1_LIMIT = 1.0
#: Equal images, whose PSNR is infinite, count as so many dB in a mean.
EQUAL_DB = 100.0


@dataclass(frozen=True)
class Limits:
    """What the images of a bundle have to meet, besides having no fault, compared with every reference."""

    #: The largest difference of top-1, in percentage points.
    top1_points: float = TOP1_LIMIT
    #: The least mean PSNR in dB. None: no limit. The parity rows limit every image of a bundle without quantization.
    psnr_db: float | None = None

    @classmethod
    def of(cls, schemes: Collection[str]) -> Limits:
        """The limits of a bundle whose parts are quantized with `schemes`: the widest of them counts."""
        if not schemes:
            return NOT_QUANTIZED
        rows = [SCHEMES[scheme] for scheme in schemes]
        return cls(max(row.quality_top1 for row in rows), min(row.quality_psnr for row in rows))


#: The limits of a bundle without quantization.
NOT_QUANTIZED = Limits()


@dataclass(frozen=True)
class Spread:
    """A measure over all images, for which more is better."""

    mean: float
    #: The 5th percentile: the lowest value that at least 5% of the images do not exceed.
    low: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float], most: float = math.inf) -> Spread:
        """`most` is what greater values count as in the mean."""
        low = float(np.percentile(values, 5, method="inverted_cdf"))
        return cls(float(np.minimum(values, most).mean()), low, min(values))

    def as_text(self, digits: int) -> str:
        return f"mean {self.mean:.{digits}f}, 5th percentile {self.low:.{digits}f}, worst {self.worst:.{digits}f}"


@dataclass(frozen=True)
class Drawn:
    """How the bundle drew its images."""

    #: Sampling steps.
    steps: int
    #: The bundle's precision.
    precision: str
    #: The scheme of each part that is quantized.
    quantize: Mapping[str, str]
    #: What ran the bundle.
    backend: str

    def as_text(self) -> str:
        parts = "".join(f", {part} {scheme}" for part, scheme in self.quantize.items())
        return f"{self.steps} step{'' if self.steps == 1 else 's'}, {self.precision} on {self.backend}{parts}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its images, uint8 [H, W, 3]. The values of each reference are in the order of `Quality.comparisons`."""

    prompt: str
    #: Seed of its batch.
    seed: int
    #: Its place in the batch.
    place: int
    image: Array
    references: tuple[Array, ...]
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    #: Whether the classifier recognizes the image, and each reference's. None: not measured.
    recognized: bool | None = None
    references_recognized: tuple[bool, ...] = ()
    #: What is wrong with the image by itself. None: nothing that was looked for.
    fault: str | None = None

    def as_json(self) -> dict[str, Any]:
        names = ("prompt", "seed", "place", "recognized", "fault")
        numbers = {"psnr_db": [*map(json_value, self.psnr_db)], "ssim": list(self.ssim)}
        return {**{name: getattr(self, name) for name in names}, **numbers}


@dataclass(frozen=True)
class Likeness:
    """The bundle's images compared with those of one reference."""

    #: `DIFFUSERS`, or the path of a bundle.
    reference: str
    psnr_db: Spread
    ssim: Spread
    #: Mean and largest LPIPS, for which less is better. None: not measured.
    lpips: tuple[float, float] | None = None
    #: Percent of the reference's images that the classifier recognizes. None: the checkpoint has no meter.
    top1: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Flat: the names are those of older reports, for which diffusers was the only reference."""
        document = {
            "reference": self.reference,
            "image_psnr_db": self.psnr_db.mean,
            "low_image_psnr_db": self.psnr_db.low,
            "least_image_psnr_db": self.psnr_db.worst,
            "image_ssim": self.ssim.mean,
            "low_image_ssim": self.ssim.low,
            "least_image_ssim": self.ssim.worst,
            "reference_top1": self.top1,
        }
        if self.lpips is not None:
            document |= {"image_lpips": self.lpips[0], "largest_image_lpips": self.lpips[1]}
        return {key: json_value(value) for key, value in document.items()}


@dataclass(frozen=True)
class Quality:
    """What was measured. The fields that are None need a meter."""

    #: The bundle's path.
    bundle: str
    drawn: Drawn
    #: One row for each prompt.
    samples: tuple[Sample, ...]
    #: With the bundle of `--against` first, if there is one, then with diffusers.
    comparisons: tuple[Likeness, ...]
    limits: Limits = NOT_QUANTIZED
    #: Why there is no LPIPS. None: there is.
    lpips_missing: str | None = None
    #: Percent of the bundle's images that the classifier recognizes.
    top1: float | None = None
    #: The same of the renders.
    renders_top1: float | None = None
    #: PSNR of the renders after diffusers' encoder and the bundle's decoder.
    reconstruction_psnr_db: float | None = None
    #: PSNR of the renders after diffusers' encoder and decoder.
    reference_reconstruction_psnr_db: float | None = None

    @property
    def faults(self) -> tuple[Sample, ...]:
        """The images that fail by themselves."""
        return tuple(sample for sample in self.samples if sample.fault is not None)

    @property
    def passed(self) -> bool:
        """Whether no image has a fault and every comparison meets the limits."""
        return not self.faults and all(self.psnr_passes(row) and self.top1_passes(row) for row in self.comparisons)

    def psnr_passes(self, row: Likeness) -> bool:
        return self.limits.psnr_db is None or row.psnr_db.mean >= self.limits.psnr_db

    def top1_passes(self, row: Likeness) -> bool:
        return self.top1 is None or row.top1 is None or abs(self.top1 - row.top1) <= self.limits.top1_points

    def as_json(self, samples: bool = True) -> dict[str, Any]:
        """The comparison with diffusers is flat, the one with a bundle is in `against`. `samples`: with a row for each prompt."""
        *against, diffusers = self.comparisons
        names = ("top1", "renders_top1", "reconstruction_psnr_db", "reference_reconstruction_psnr_db", "lpips_missing")
        document = {
            "prompts": len(self.samples),
            "steps": self.drawn.steps,
            "precision": self.drawn.precision,
            "quantize": dict(self.drawn.quantize),
            "backend": self.drawn.backend,
            **diffusers.as_json(),
            **{name: json_value(getattr(self, name)) for name in names},
            "against": against[0].as_json() if against else None,
            "faults": [sample.as_json() for sample in self.faults],
            "psnr_limit_db": self.limits.psnr_db,
            "top1_limit_points": self.limits.top1_points,
            "passed": self.passed,
        }
        return document | ({"images": [sample.as_json() for sample in self.samples]} if samples else {})

    def as_text(self) -> str:
        lines = [f"quality over {len(self.samples)} prompts, {self.drawn.as_text()}"]
        for row in self.comparisons:
            lines.append(f"  against {row.reference}")
            limit = "" if self.limits.psnr_db is None else f"  (limit: mean {self.limits.psnr_db:g} dB)"
            lines.append(f"    {_mark(self.psnr_passes(row))} image psnr in dB: {row.psnr_db.as_text(1)}{limit}")
            lines.append(f"           image ssim: {row.ssim.as_text(4)}")
            if row.lpips is not None:
                lines.append("           image lpips: mean {:.4f}, worst {:.4f}".format(*row.lpips))
            if row.top1 is not None:
                limit = f"  (limit: {self.limits.top1_points:.1f} points apart)"
                lines.append(f"    {_mark(self.top1_passes(row))} top-1 {self.top1:.1f}%, of the reference {row.top1:.1f}%{limit}")
        if self.top1 is None:
            lines.append(f"  top-1 and reconstruction: not measured, because the checkpoint has no folder {FOLDER}/ (tiny has one)")
        else:
            lines.append(f"  top-1 of real renders {self.renders_top1:.1f}%")
            ours, reference = self.reconstruction_psnr_db, self.reference_reconstruction_psnr_db
            lines.append(f"  reconstruction psnr {ours:.2f} dB, diffusers {reference:.2f} dB")
        lines += [f"  LPIPS: not measured, because {self.lpips_missing}"] if self.lpips_missing else []
        lines.append(f"  {_mark(not self.faults)} blank, saturated or not finite: {len(self.faults)} images")
        return "\n".join([*lines, *(f"         {shown(sample)}: {sample.fault}" for sample in self.faults)])


def shown(sample: Sample) -> str:
    """Which image a sample is."""
    return f"{sample.prompt[:40]!r} (seed {sample.seed}, image {sample.place + 1})"


def _mark(passed: bool) -> str:
    return "ok    " if passed else "MISSED"


def worst_first(samples: Iterable[Sample]) -> list[Sample]:
    """Images with a fault first, then by PSNR against the first reference."""
    return sorted(samples, key=lambda sample: (sample.fault is None, sample.psnr_db[0]))
