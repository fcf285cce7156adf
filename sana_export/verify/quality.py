"""The quality meter: whether a bundle's images show what they should, compared with those of diffusers in float32.

A full measurement needs a folder `quality/` in the checkpoint, which the embedded `tiny` has. It contains `meter.json` (the names
of the concepts, prompts that ask for one concept each, and the concepts of the renders), `renders.png` (real images side by side)
and `classifier.onnx`, which recognizes the concepts. For other checkpoints, only the distance between the images is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sana_export.errors import ArtifactError
from sana_export.export.parity import psnr, ssim
from sana_export.formats.arrays import Array
from sana_export.manifest import ModelInfo
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.runtime import SanaRuntime
from sana_export.runtime.request import Request

FOLDER = "quality"
#: Prompts that are sampled in one batch. The seed of a batch is its number.
BATCH = 20
#: Largest allowed difference between the top-1 of a bundle and of diffusers, in percentage points.
TOP1_LIMIT = 1.0

#: Samples a request with the bundle and with diffusers and returns the images of both, uint8 [B, H, W, 3].
SampleBoth = Callable[[Request], tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class Meter:
    """The content of a checkpoint's folder `quality`."""

    #: The names of the concepts.
    concepts: tuple[str, ...]
    #: Prompts, each with the index of its concept.
    prompts: tuple[tuple[str, int], ...]
    #: Real images of the concepts, uint8 [N, H, W, 3].
    renders: Array
    #: The index of each render's concept, [N].
    render_concepts: Array
    #: The ONNX file of the classifier.
    classifier: Path

    @classmethod
    def find(cls, checkpoint: Path) -> Meter | None:
        """The meter in the checkpoint's folder, or None if it has none. Raises ArtifactError if it is damaged."""
        folder = checkpoint / FOLDER
        if not folder.is_dir():
            return None
        try:
            stated = json.loads((folder / "meter.json").read_text("utf-8"))
            sheet = np.asarray(Image.open(folder / "renders.png").convert("RGB"))
            side, wanted = stated["render_size"], np.array(stated["render_concepts"])
            rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
            tiles = sheet.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
            prompts = tuple((str(text), int(concept)) for text, concept in stated["prompts"])
            return cls(tuple(stated["concepts"]), prompts, tiles[: len(wanted)], wanted, folder / "classifier.onnx")
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder} is damaged", found=error, wanted="meter.json and renders.png of this release") from error

    def classify(self, images: Array) -> Array:
        """The most likely concept [N] of uint8 images [N, H, W, 3] of the renders' size."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(self.classifier), options, providers=["CPUExecutionProvider"])
        logits: Array = session.run(None, {"pictures": images.astype(np.float32)})[0]
        return logits.argmax(axis=1)


@dataclass(frozen=True)
class Quality:
    """What was measured. The fields that are None need a meter. "Reference" is diffusers in float32."""

    #: Number of prompts.
    prompts: int
    #: Mean PSNR of the bundle's images against the reference's.
    image_psnr_db: float
    #: PSNR of the worst image.
    least_image_psnr_db: float
    #: Mean SSIM of the bundle's images against the reference's.
    image_ssim: float
    #: SSIM of the worst image.
    least_image_ssim: float
    #: Percent of the bundle's images that the classifier recognizes.
    top1: float | None = None
    #: The same of the reference's images.
    reference_top1: float | None = None
    #: The same of the renders.
    renders_top1: float | None = None
    #: PSNR of the renders after the reference's encoder and the bundle's decoder.
    reconstruction_psnr_db: float | None = None
    #: PSNR of the renders after the reference's encoder and decoder.
    reference_reconstruction_psnr_db: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the bundle's top-1 is within `TOP1_LIMIT` points of diffusers'."""
        return self.top1 is None or self.reference_top1 is None or abs(self.top1 - self.reference_top1) <= TOP1_LIMIT

    def as_json(self) -> dict[str, Any]:
        return {**finite(vars(self)), "top1_limit_points": TOP1_LIMIT, "passed": self.passed}

    def as_text(self) -> str:
        lines = [
            f"quality over {self.prompts} prompts, compared with diffusers in fp32",
            f"  image psnr {self.image_psnr_db:.1f} dB (worst {self.least_image_psnr_db:.1f}), "
            f"ssim {self.image_ssim:.4f} (worst {self.least_image_ssim:.4f})",
        ]
        if self.top1 is None:
            lines.append(f"  top-1 and reconstruction: not measured, because the checkpoint has no folder {FOLDER}/ (tiny has one)")
            return "\n".join(lines)
        return "\n".join(
            [
                *lines,
                f"  {'ok    ' if self.passed else 'MISSED'} top-1 {self.top1:.1f}%, diffusers {self.reference_top1:.1f}% "
                f"(limit: {TOP1_LIMIT:g} point difference), real renders {self.renders_top1:.1f}%",
                f"  reconstruction psnr {self.reconstruction_psnr_db:.2f} dB, "
                f"diffusers {self.reference_reconstruction_psnr_db:.2f} dB",
            ]
        )


def measure_quality(
    runtime: SanaRuntime,
    pipeline: Any,
    meter: Meter | None,
    sample_both: SampleBoth,
    *,
    prompts: tuple[str, ...] = (),
    steps: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Quality:
    """Sample the meter's prompts at the checkpoint's native size and compare the images with those of diffusers' `pipeline`.

    Without a meter, `prompts` are sampled. `steps` None means the checkpoint's default.
    """
    model = runtime.manifest.model
    samples = [(text, -1) for text in prompts] if meter is None else meter.prompts
    found: list[Array] = []
    wanted: list[Array] = []
    for index, request in enumerate(quality_requests(model, samples, steps)):
        on_progress(Progress("sampling for quality", index * BATCH, len(samples)))
        for images, more in zip((found, wanted), sample_both(request), strict=True):
            images.extend(more)
    ratios = [psnr(ours, theirs, peak=255.0) for ours, theirs in zip(found, wanted, strict=True)]
    likeness = [ssim(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]
    # Equal images count as 100 dB in the mean.
    distances = (float(np.minimum(ratios, 100.0).mean()), min(ratios), float(np.mean(likeness)), min(likeness))
    if meter is None:
        return Quality(len(samples), *distances)
    concepts = np.array([concept for _, concept in samples])
    ours, reference = _reconstruct(runtime, pipeline, meter.renders)
    return Quality(
        len(samples),
        *distances,
        top1=share(meter.classify(np.stack(found)), concepts),
        reference_top1=share(meter.classify(np.stack(wanted)), concepts),
        renders_top1=share(meter.classify(meter.renders), meter.render_concepts),
        reconstruction_psnr_db=psnr(ours, meter.renders, peak=255.0),
        reference_reconstruction_psnr_db=psnr(reference, meter.renders, peak=255.0),
    )


def quality_requests(model: ModelInfo, samples: Iterable[tuple[str, int]], steps: int | None) -> Iterator[Request]:
    """The requests that sample the prompts of `samples` at the native size, `BATCH` at a time."""
    for index, batch in enumerate(_batches(samples)):
        yield Request(
            prompt=[text for text, _ in batch],
            num_inference_steps=steps or model.default_steps,
            guidance_scale=model.default_guidance_scale,
            height=model.native_size,
            width=model.native_size,
            seed=index,
            use_resolution_binning=False,
        )


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with infinite numbers as text: JSON has none."""
    return {key: str(value) if isinstance(value, float) and math.isinf(value) else value for key, value in values.items()}


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
            images.append(((image / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))
    return np.concatenate(decoded[0]), np.concatenate(decoded[1])


def share(found: Array, wanted: Array) -> float:
    """Percent of equal elements."""
    return 100.0 * float((found == wanted).mean())


def _batches(samples: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    remaining = iter(samples)
    while batch := list(islice(remaining, BATCH)):
        yield batch
