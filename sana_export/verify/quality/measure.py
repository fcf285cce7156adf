"""Draws the prompts with a bundle, with diffusers and with another bundle, and compares the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sana_export.export.parity import psnr, ssim
from sana_export.formats.arrays import Array
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.runtime import SanaRuntime
from sana_export.runtime.request import Request
from sana_export.verify.drawing import Drawing
from sana_export.verify.quality import perceptual
from sana_export.verify.quality.faults import image_fault
from sana_export.verify.quality.meter import BATCH, Meter, percent, quality_requests
from sana_export.verify.quality.result import EQUAL_DB, NOT_QUANTIZED, Drawn, Likeness, Limits, Quality, Sample, Spread

#: Draws the images of a request.
Draw = Callable[[Request], Drawing]
#: The fault of an image that could not be drawn.
NOT_FINITE = "NaN or infinite values"


@dataclass(frozen=True)
class Reference:
    """Something that a bundle is compared with."""

    #: `result.DIFFUSERS`, or the path of a bundle.
    name: str
    draw: Draw


def measure_quality(
    runtime: SanaRuntime,
    pipeline: Any,
    meter: Meter | None,
    draw: Draw,
    references: Sequence[Reference],
    *,
    limits: Limits = NOT_QUANTIZED,
    prompts: tuple[str, ...] = (),
    steps: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Quality:
    """Draw the meter's prompts at the checkpoint's native size with `draw` (the bundle of `runtime`) and with every reference.

    The last reference is diffusers' `pipeline`. It decides whether an image has a fault. Without a meter, `prompts` are drawn.
    `steps` None means the checkpoint's default.
    """
    model = runtime.manifest.model
    wanted = [(text, -1) for text in prompts] if meter is None else meter.prompts
    samples: list[Sample] = []
    for request in quality_requests(model, wanted, steps):
        on_progress(Progress("sampling for quality", len(samples), len(wanted)))
        found, others = draw(request), [reference.draw(request).images for reference in references]
        for place, (text, _) in enumerate(wanted[len(samples) : len(samples) + len(found.images)]):
            samples.append(_sample(text, request.seed, place, found, [images[place] for images in others]))
    distance, missing = perceptual.find()
    comparisons = []
    for index, reference in enumerate(references):
        on_progress(Progress(f"comparing with {reference.name}", len(samples), len(samples)))
        ratios, likeness = [sample.psnr_db[index] for sample in samples], [sample.ssim[index] for sample in samples]
        lpips = None
        if distance is not None:
            far = [distance(sample.image, sample.references[index]) for sample in samples]
            lpips = float(np.mean(far)), max(far)
        comparisons.append(Likeness(reference.name, Spread.of(ratios, EQUAL_DB), Spread.of(likeness), lpips))
    options = runtime.manifest.options
    conditions = Drawn(steps or model.default_steps, options.precision, options.quantize, runtime.backend.name)
    quality = Quality(str(runtime.bundle), conditions, tuple(samples), tuple(comparisons), limits, missing)
    return quality if meter is None else _metered(quality, meter, runtime, pipeline)


def _sample(prompt: str, seed: Any, place: int, found: Drawing, references: Sequence[Array]) -> Sample:
    """The row of the image at `place` of a batch."""
    image = found.images[place]
    return Sample(
        prompt,
        seed,
        place,
        image,
        tuple(references),
        tuple(psnr(image, reference, peak=255.0) for reference in references),
        tuple(ssim(image, reference) for reference in references),
        fault=image_fault(image, references[-1]) if found.finite[place] else NOT_FINITE,
    )


def _metered(quality: Quality, meter: Meter, runtime: SanaRuntime, pipeline: Any) -> Quality:
    """`quality` with what needs the meter."""
    concepts = np.array([concept for _, concept in meter.prompts])
    right = meter.classify(np.stack([sample.image for sample in quality.samples])) == concepts
    others, rows = [], []
    for index, row in enumerate(quality.comparisons):
        others.append(meter.classify(np.stack([sample.references[index] for sample in quality.samples])) == concepts)
        rows.append(replace(row, top1=percent(others[-1])))
    samples = [
        replace(sample, recognized=bool(right[index]), references_recognized=tuple(bool(other[index]) for other in others))
        for index, sample in enumerate(quality.samples)
    ]
    ours, reference = _reconstruct(runtime, pipeline, meter.renders)
    return replace(
        quality,
        samples=tuple(samples),
        comparisons=tuple(rows),
        top1=percent(right),
        renders_top1=percent(meter.classify(meter.renders) == meter.render_concepts),
        reconstruction_psnr_db=psnr(ours, meter.renders, peak=255.0),
        reference_reconstruction_psnr_db=psnr(reference, meter.renders, peak=255.0),
    )


@torch.no_grad()
def _reconstruct(runtime: SanaRuntime, pipeline: Any, renders: Array) -> tuple[Array, Array]:
    """Images uint8 [N, H, W, 3] after diffusers' encoder and the bundle's decoder, and after diffusers' encoder and decoder."""
    decoded: tuple[list[Array], list[Array]] = ([], [])
    for start in range(0, len(renders), BATCH):
        part = torch.from_numpy(renders[start : start + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = pipeline.vae.encode(part).latent * pipeline.vae.config.scaling_factor
        ours = runtime.to_host(runtime.run("vae_decoder", {"latents": latents.numpy()})["image"])
        reference = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        for images, image in zip(decoded, (ours, reference.numpy()), strict=True):
            images.append(((np.nan_to_num(image) / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))
    return np.concatenate(decoded[0]), np.concatenate(decoded[1])
