"""Verification of a bundle: compares every graph and whole images with diffusers and transformers in float32.

On a CPU, a half-precision bundle runs in the storage evaluator (export/evaluator.py), because ONNX Runtime would hide its
overflows.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.commands import export_command, model_words, reference_command
from sana_export.errors import UsageError
from sana_export.export.evaluator import RangeMeter
from sana_export.export.parity import Parity, compare_images, compare_tensors
from sana_export.files import locked, manifest_lock
from sana_export.hub.origin import origin_of
from sana_export.known_files import hash_always
from sana_export.manifest import Manifest, ModelInfo
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.quantization.layers import EMBEDDINGS
from sana_export.runtime import SanaRuntime
from sana_export.runtime.guidance import WHOLE
from sana_export.runtime.memory import AUTO
from sana_export.runtime.request import Request
from sana_export.user_paths import user_path
from sana_export.verify.drawing import Pair, draw, draw_reference, sample_both
from sana_export.verify.evaluator_backend import EvaluatorBackend, evaluator_backend, open_runtime
from sana_export.verify.graph_checks import GRAPH_CHECKS
from sana_export.verify.intervals import ALL_STEPS, IntervalCost, Intervals, measure_intervals
from sana_export.verify.quality.faults import image_fault
from sana_export.verify.quality.measure import NOT_FINITE, Reference, measure_quality
from sana_export.verify.quality.meter import Meter
from sana_export.verify.quality.result import DIFFUSERS, Limits, Quality
from sana_export.verify.quantized import check_stored
from sana_export.verify.reference import load_reference
from sana_export.verify.report import RangeReport, VerifyReport

PROMPTS = ("a red apple on a table", "一只可爱的熊猫在吃竹子", "A cute 🐼 eating 🎋, ink drawing style", "")
PAG_SCALE = 2.0
#: The check of a graph also runs this part of the bundle.
_READS = {"text_encoder": EMBEDDINGS, "denoiser": "controlnet"}
SIZE = 256
STEPS = 8


@dataclass(frozen=True)
class Sampling:
    """What is sampled, without resolution binning."""

    #: One image is sampled for each.
    prompts: Sequence[str] = PROMPTS
    #: Height in pixels. None: `SIZE`, or the native size if that is smaller.
    height: int | None = None
    #: Width in pixels, with the same default.
    width: int | None = None
    #: Sampling steps. None: `STEPS`, or the checkpoint's default if that is smaller.
    steps: int | None = None
    #: Guidance scale. None: the checkpoint's default.
    guidance_scale: float | None = None
    #: Seed of every image.
    seed: int = 42

    def request(self, prompt: str, model: ModelInfo, pag_scale: float = 0.0) -> Request:
        """The request for one prompt, with every setting that diffusers needs."""
        return Request(
            prompt=prompt,
            num_inference_steps=self.steps or min(STEPS, model.default_steps),
            guidance_scale=model.default_guidance_scale if self.guidance_scale is None else self.guidance_scale,
            pag_scale=pag_scale,
            height=self.height or min(SIZE, model.native_size),
            width=self.width or min(SIZE, model.native_size),
            seed=self.seed,
            use_resolution_binning=False,
        )


@torch.no_grad()
def verify_bundle(
    bundle: Path,
    checkpoint: SanaCheckpoint,
    sampling: Sampling = Sampling(),
    *,
    backend: str = AUTO,
    device: int | None = None,
    threads: int | None = None,
    quality: bool = False,
    against: Path | None = None,
    intervals: Intervals = ALL_STEPS,
    on_progress: OnProgress = ignore_progress,
) -> VerifyReport:
    """Compare every graph on fresh inputs, then sample every prompt with both and compare latents and images.

    `backend`, `device` and `threads` are those of `open_runtime`. `quality` also measures what the images show (quality/), compared
    with diffusers and with those of the bundle `against`, if there is one. `intervals`, unless they are all steps, also measures
    what guidance in them costs (intervals.py). A bundle with PAG layers is also sampled with PAG. Every file that it loads is
    hashed. The report is stored in the bundle's manifest, except in the hub's cache. Raises UsageError if a bundle was not exported
    from `checkpoint`.
    """
    bundle = user_path(bundle, "the bundle")
    open_with = partial(open_runtime, backend=backend, device=device, threads=threads)
    other = nullcontext() if against is None else open_with(user_path(against, "the bundle to compare with"))
    with hash_always(), open_with(bundle) as runtime, other as base:
        for opened in filter(None, (runtime, base)):
            check_origin(opened.bundle, opened.manifest, checkpoint)
        measure = partial(_measure_quality, base) if quality else None
        report = _compare(runtime, checkpoint, sampling, measure, intervals, on_progress)
    origin = origin_of(bundle)
    if origin is None or origin.folder is not None:  # the hub's cache stays as it was downloaded
        with locked(manifest_lock(bundle)):
            replace(Manifest.load(bundle), parity=report.as_json(samples=False)).save(bundle)
    return report


def _compare(
    runtime: SanaRuntime,
    checkpoint: SanaCheckpoint,
    sampling: Sampling,
    measure: Callable[..., Quality] | None,
    intervals: Intervals,
    on_progress: OnProgress,
) -> VerifyReport:
    """The report of `verify_bundle` for the bundle in `runtime`. `measure` is `_measure_quality`, if quality is measured."""
    bundle, manifest, prompts = runtime.bundle, runtime.manifest, sampling.prompts
    for prompt in prompts:  # checks the values before anything is computed
        sampling.request(prompt, manifest.model)
    # Before the long comparison, so that intervals that the bundle cannot sample are reported at once.
    cost = None if intervals.whole else _measure_intervals(runtime, checkpoint, sampling, intervals, on_progress)
    pipeline = load_reference(checkpoint, manifest.options, pag=False)
    # A bundle, or its engines, may lack the graphs of the tiled decoder.
    names = [name for name in GRAPH_CHECKS if name in manifest.graphs and runtime.backend.ranges(name) is not None]
    scales = [0.0, PAG_SCALE] if manifest.options.pag_layers else [0.0]
    total = len(names) + len(prompts) * len(scales)
    graphs: list[Parity] = []
    for name in names:
        on_progress(Progress(name, len(graphs), total))
        found, wanted = GRAPH_CHECKS[name](runtime, pipeline, prompts, sampling.seed)
        graphs.append(compare_tensors(name, found, wanted, manifest.options.precision, _scheme(manifest, name)))
        if manifest.graphs[name].quantized:
            graphs += check_stored(runtime, checkpoint, name, sampling.seed)
    latents: list[Parity] = []
    images: list[Parity] = []
    for scale in scales:
        reference = load_reference(checkpoint, manifest.options, pag=True) if scale else pipeline
        for prompt in prompts:
            doing = f"sampling {prompt!r}" + (" with PAG" if scale else "")
            on_progress(Progress(doing, len(graphs) + len(images), total))
            pair = sample_both(runtime, reference, sampling.request(prompt, manifest.model, scale))
            name = f"{prompt[:24]!r}" + (f" pag {scale:g}" if scale else "")
            latents.append(_latents_row(f"latents {name}", pair))
            images.append(_image_row(f"image {name}", pair, manifest))
    measured = None if measure is None else measure(runtime, pipeline, checkpoint, sampling, on_progress)
    return VerifyReport(
        str(bundle),
        checkpoint.source,
        manifest.options.precision,
        runtime.backend.name,
        runtime.backend.device,
        tuple(graphs),
        tuple(latents),
        tuple(images),
        measured,
        cost,
    )


def _latents_row(name: str, pair: Pair) -> Parity:
    """Latents have no limit, but they must be finite."""
    passed = bool(np.isfinite(pair.found.latents).all())
    row = compare_tensors(name, *pair.latents, "fp32")
    return replace(row, passed=passed, limit="none: the image counts" if passed else NOT_FINITE)


def _image_row(name: str, pair: Pair, manifest: Manifest) -> Parity:
    """An image that is not finite, is blank or is saturated fails, however wide the limit of PSNR is."""
    row = compare_images(name, *pair.images, manifest.options.precision, manifest.options.quantize.values())
    faults = [image_fault(*images) for images in zip(*pair.images, strict=True)] if pair.found.finite.all() else [NOT_FINITE]
    fault = next(filter(None, faults), None)
    return row if fault is None else replace(row, passed=False, limit=f"{row.limit}; found {fault}")


def _scheme(manifest: Manifest, graph: str) -> str | None:
    """The scheme that counts for the comparison of a graph with diffusers: its own, or that of what it reads in its check."""
    return manifest.options.scheme(graph) or manifest.options.quantize.get(_READS.get(graph, ""))


def check_origin(bundle: Path, manifest: Manifest, checkpoint: SanaCheckpoint, verb: str = "verify") -> None:
    """Raise UsageError, with a command of `verb`, unless `bundle` was exported from `checkpoint` as it is now."""
    if checkpoint.sha256 != manifest.checkpoint.sha256:
        same = model_words(checkpoint.record()) == model_words(manifest.checkpoint)  # and its files have changed since then
        raise UsageError(
            f"{bundle} was not exported from {checkpoint.source}",
            found=f"weights and configs with the hash {checkpoint.sha256[:16]}",
            wanted=f"{shlex.join(model_words(manifest.checkpoint))}, with the hash {manifest.checkpoint.sha256[:16]}",
            fix=export_command(bundle, manifest) if same else reference_command(verb, bundle, manifest),
        )


def _measure_quality(
    base: SanaRuntime | None,
    runtime: SanaRuntime,
    pipeline: Any,
    checkpoint: SanaCheckpoint,
    sampling: Sampling,
    on_progress: OnProgress,
) -> Quality:
    """Compared with the bundle in `base`, if there is one, and with diffusers."""
    references = [Reference(DIFFUSERS, partial(draw_reference, runtime, pipeline))]
    if base is not None:
        references.insert(0, Reference(str(base.bundle), partial(draw, base)))
    return measure_quality(
        runtime,
        pipeline,
        Meter.find(checkpoint.folder),
        partial(draw, runtime),
        references,
        limits=Limits.of(runtime.manifest.options.quantize.values()),
        prompts=tuple(sampling.prompts),
        steps=sampling.steps,
        on_progress=on_progress,
    )


def _measure_intervals(
    runtime: SanaRuntime, checkpoint: SanaCheckpoint, sampling: Sampling, intervals: Intervals, on_progress: OnProgress
) -> IntervalCost:
    """PAG is on if its interval is not the default."""
    (cost,) = measure_intervals(
        runtime,
        Meter.find(checkpoint.folder),
        [intervals],
        pag_scale=0.0 if intervals.pag_interval == WHOLE else PAG_SCALE,
        guidance_scale=sampling.guidance_scale,
        prompts=tuple(sampling.prompts),
        steps=sampling.steps,
        on_progress=on_progress,
    )
    return cost


@torch.no_grad()
def measure_ranges(
    bundle: Path,
    sampling: Sampling = Sampling(),
    *,
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> RangeReport:
    """Sample the prompts with the bundle's half-precision graphs, computed in float32, and report how large every tensor gets.

    Raises UsageError for an fp32 bundle, which has no half-precision tensors.
    """
    bundle = user_path(bundle, "the bundle")
    manifest = Manifest.load(bundle)
    if manifest.options.precision == "fp32":
        raise UsageError(
            f"{bundle} has no half-precision tensors",
            found="an fp32 bundle",
            wanted="fp16 or bf16",
            fix=export_command(bundle.with_name(f"{bundle.name}-fp16"), manifest, precision="fp16") + " --dtype fp16",
        )
    backend, prompts = evaluator_backend(partial(RangeMeter, threads=threads), "float32 with ranges"), sampling.prompts
    with hash_always(), SanaRuntime.from_pretrained(bundle, backend=backend) as runtime:
        for done, prompt in enumerate(prompts):
            on_progress(Progress(f"sampling {prompt!r}", done, len(prompts)))
            plan = runtime.plan(sampling.request(prompt, manifest.model))
            *_, last = runtime.steps(plan, runtime.encode(plan))
            # Not runtime.decode, which raises an error if the latents overflowed: the report is about overflows.
            image = runtime.run("vae_decoder", {"latents": last.latents})["image"]
            if "vae_encoder" in manifest.graphs:
                runtime.run("vae_encoder", {"image": np.nan_to_num(image, posinf=1.0, neginf=-1.0).clip(-1, 1)})
        evaluators = cast(EvaluatorBackend, runtime.backend).evaluators.values()
        rows = [row for evaluator in evaluators for row in cast(RangeMeter, evaluator).ranges()]
    return RangeReport(str(bundle), tuple(prompts), tuple(sorted(rows, key=lambda row: row.headroom)))
