"""What guidance in an interval of the steps costs: the images of a bundle with it, compared with its own images without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sana_export.export.parity import psnr, ssim
from sana_export.formats.arrays import Array
from sana_export.json_records import json_value
from sana_export.manifest import Manifest
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.runtime import SanaRuntime
from sana_export.runtime.guidance import WHOLE, Interval
from sana_export.runtime.inputs import checked_interval
from sana_export.runtime.plan import Plan
from sana_export.verify.quality.meter import BATCH, Meter, percent, quality_requests


@dataclass(frozen=True)
class Intervals:
    """The intervals of a request, as fractions of the steps."""

    guidance_interval: Interval = WHOLE
    pag_interval: Interval = WHOLE

    def __post_init__(self) -> None:
        """Raise UsageError for values that are not intervals."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, checked_interval(name, value))

    @property
    def whole(self) -> bool:
        """Whether all steps have guidance."""
        return (self.guidance_interval, self.pag_interval) == (WHOLE, WHOLE)


#: Guidance in all steps.
ALL_STEPS = Intervals()


@dataclass(frozen=True)
class IntervalCost:
    """What was measured for one pair of intervals. "Full" is the same bundle with guidance in all steps."""

    guidance_interval: Interval
    pag_interval: Interval
    #: 0: without PAG.
    pag_scale: float
    #: Number of prompts.
    prompts: int
    #: Mean PSNR of the images against the full run's. Equal images count as 100 dB.
    image_psnr_db: float
    #: PSNR of the worst image.
    least_image_psnr_db: float
    #: Mean SSIM of the images against the full run's.
    image_ssim: float
    #: SSIM of the worst image.
    least_image_ssim: float
    #: Layers that the denoiser runs for an image, all branches and steps together, divided by those of the full run.
    work: float
    #: Seconds of the sampling loop for an image, the median of the batches.
    seconds: float
    #: The same of the full run.
    full_seconds: float
    #: Percent of the images that the classifier recognizes. None: the checkpoint has no meter.
    top1: float | None = None
    #: The same of the full run's images.
    full_top1: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: json_value(value) for key, value in vars(self).items()}

    def as_text(self) -> str:
        ms, full = 1e3 * self.seconds, 1e3 * self.full_seconds
        guidance, pag = ("{:g} to {:g}".format(*interval) for interval in (self.guidance_interval, self.pag_interval))
        head = f"guidance in {guidance} of the steps" + f", PAG {self.pag_scale:g} in {pag}" * (self.pag_scale > 0)
        lines = [
            f"{head}, compared with all steps over {self.prompts} prompts",
            f"  image psnr {self.image_psnr_db:.1f} dB (worst {self.least_image_psnr_db:.1f}), "
            f"ssim {self.image_ssim:.4f} (worst {self.least_image_ssim:.4f})",
            f"  denoiser work {self.work:.1%}, sampling {ms:.1f} ms an image instead of {full:.1f} ms",
        ]
        if self.top1 is not None:
            lines.append(f"  top-1 {self.top1:.1f}%, in all steps {self.full_top1:.1f}%")
        return "\n".join(lines)


def measure_intervals(
    runtime: SanaRuntime,
    meter: Meter | None,
    intervals: Sequence[Intervals],
    *,
    pag_scale: float = 0.0,
    guidance_scale: float | None = None,
    prompts: tuple[str, ...] = (),
    steps: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> list[IntervalCost]:
    """Sample the meter's prompts, or `prompts` without one, in all steps and in each of `intervals`, which alternate.

    Requests are those of `measure_quality`, with `pag_scale`, and with `guidance_scale` unless it is None. Raises
    UsageError if the bundle cannot meet them, before anything is sampled.
    """
    samples = [(text, -1) for text in prompts] if meter is None else meter.prompts
    scales: dict[str, Any] = {"pag_scale": pag_scale} | ({} if guidance_scale is None else {"guidance_scale": guidance_scale})
    requests = [replace(request, **scales) for request in quality_requests(runtime.manifest.model, samples, steps)]
    settings = (ALL_STEPS, *intervals)
    plans = [runtime.plan(replace(requests[0], **vars(setting))) for setting in settings]
    runs = [denoiser_layers(plan, runtime.manifest) for plan in plans]
    found: list[list[Array]] = [[] for _ in settings]
    seconds: list[list[float]] = [[] for _ in settings]
    for index, request in enumerate(requests):
        on_progress(Progress("sampling with intervals", index * BATCH, len(samples)))
        for number, setting in enumerate(settings):
            result = runtime(**vars(replace(request, **vars(setting))))
            seconds[number].append(result.timings.denoise_loop / len(result.images))
            found[number] += [np.asarray(image) for image in result.images]
    concepts = np.array([concept for _, concept in samples])
    top1 = [None if meter is None else percent(meter.classify(np.stack(images)) == concepts) for images in found]
    costs = []
    for number, setting in enumerate(intervals, start=1):
        pairs = list(zip(found[number], found[0], strict=True))
        ratios, likeness = [psnr(*pair, peak=255.0) for pair in pairs], [ssim(*pair) for pair in pairs]
        costs.append(
            IntervalCost(
                setting.guidance_interval,
                setting.pag_interval,
                pag_scale,
                len(samples),
                float(np.minimum(ratios, 100.0).mean()),
                min(ratios),
                float(np.mean(likeness)),
                min(likeness),
                runs[number] / runs[0],
                float(np.median(seconds[number])),
                float(np.median(seconds[0])),
                top1[number],
                top1[0],
            )
        )
    return costs


def denoiser_layers(plan: Plan, manifest: Manifest) -> int:
    """How many layers the denoiser runs for the plan, each branch of each step counted by itself.

    Before the first PAG layer, the perturbed branch does not run.
    """
    context = next(tensor for tensor in manifest.graphs["denoiser"].spec.inputs if tensor.name == "context")
    layers = int(context.shape[0])
    shared = min(manifest.options.pag_layers, default=0)
    runs = ((len(part.branches.texts), len(part.branches.names), part.stop - part.first) for part in plan.segments)
    return sum(steps * (texts * shared + branches * (layers - shared)) for texts, branches, steps in runs)
