"""The proof of a bundle: every graph and whole pictures against diffusers and transformers in float32.

On a CPU a half-precision bundle runs in the storage evaluator (evaluator.py), because ONNX Runtime would hide its overflows.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.commands import export_line, model_words
from sana_export.errors import UsageError
from sana_export.export.evaluator import RangeMeter
from sana_export.export.parity import Parity, compare_images, compare_tensors
from sana_export.files import locked, manifest_lock
from sana_export.formats.arrays import Array
from sana_export.manifest import Manifest, ModelInfo
from sana_export.runtime import SanaRuntime
from sana_export.runtime.memory import AUTO
from sana_export.runtime.request import Request, bins_resolution
from sana_export.verify.evaluator_backend import EvaluatorBackend, evaluator_backend, open_runtime
from sana_export.verify.graph_checks import GRAPH_CHECKS
from sana_export.verify.quality import Meter, measure_quality
from sana_export.verify.reference import call_reference, load_reference
from sana_export.verify.report import RangeReport, VerifyReport

PROMPTS = ("a red apple on a table", "一只可爱的熊猫在吃竹子", "A cute 🐼 eating 🎋, ink drawing style", "")
PAG_SCALE = 2.0
SIZE = 256
STEPS = 8

#: Called with what is about to be done, the count of steps done and of all steps.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sampling:
    """What is sampled: sizes in pixels without resolution binning. None: `SIZE`, or the checkpoint's own where that is less.

    `steps` None: 8, or the checkpoint's own number where that is less. `guidance_scale` None: the checkpoint's own.
    """

    prompts: Sequence[str] = PROMPTS
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 42

    def request(self, prompt: str, model: ModelInfo, pag_scale: float = 0.0) -> Request:
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
    on_progress: Progress = lambda doing, done, total: None,
) -> VerifyReport:
    """Compare every graph on fresh inputs, then sample every prompt with both and compare latents and pictures.

    `backend`, `device` and `threads` are those of `open_runtime`. `quality` measures what the pictures show too (quality.py). A
    bundle with PAG layers is sampled with PAG as well. The report is kept in the bundle's manifest. Raises UsageError where
    `checkpoint` is not the one that the bundle was made from.
    """
    runtime = open_runtime(bundle, backend, device=device, threads=threads)
    manifest = runtime.manifest
    if checkpoint.sha256 != manifest.checkpoint.sha256:
        raise UsageError(
            f"{bundle} was not exported from {checkpoint.source}",
            found=f"weights and configs of hash {checkpoint.sha256[:16]}",
            wanted=f"{shlex.join(model_words(manifest.checkpoint))}, of hash {manifest.checkpoint.sha256[:16]}",
            fix=export_line(bundle, manifest),
        )
    prompts = sampling.prompts
    scales = [0.0, PAG_SCALE] if manifest.options.pag_layers else [0.0]
    # A decoder may be without its parts, in the bundle or among the engines.
    held = [name for name in manifest.graphs if runtime.backend.ranges(name) is not None]
    checks = {name: check for name, check in GRAPH_CHECKS.items() if name in held}
    total = len(checks) + len(prompts) * len(scales)
    pipeline = load_reference(checkpoint, manifest.options, pag=False)
    graphs: list[Parity] = []
    for done, (name, check) in enumerate(checks.items()):
        on_progress(name, done, total)
        found, wanted = check(runtime, pipeline, prompts, sampling.seed)
        graphs.append(compare_tensors(name, found, wanted, manifest.options.precision))
    latents: list[Parity] = []
    images: list[Parity] = []
    for scale in scales:
        reference = load_reference(checkpoint, manifest.options, pag=True) if scale else pipeline
        for prompt in prompts:
            on_progress(f"sampling {prompt!r}" + (" with PAG" if scale else ""), len(graphs) + len(images), total)
            pair = sample_both(runtime, reference, sampling.request(prompt, manifest.model, scale))
            name = f"{prompt[:24]!r}" + (f" pag {scale:g}" if scale else "")
            latents.append(compare_tensors(f"latents {name}", *pair.latents, manifest.options.precision))
            images.append(compare_images(f"image {name}", *pair.images, manifest.options.precision))
    measured = None
    if quality:
        measured = measure_quality(
            runtime,
            pipeline,
            Meter.find(checkpoint.folder),
            lambda request: sample_both(runtime, pipeline, request).images,
            prompts=tuple(prompts),
            steps=sampling.steps,
            on_progress=on_progress,
        )
    report = VerifyReport(
        str(bundle),
        checkpoint.source,
        manifest.options.precision,
        runtime.backend.name,
        tuple(graphs),
        tuple(replace(row, passed=True, limit="none: the picture counts") for row in latents),
        tuple(images),
        measured,
    )
    with locked(manifest_lock(bundle)):
        replace(Manifest.load(bundle), parity=report.as_json()).save(bundle)
    return report


@dataclass(frozen=True, eq=False)
class Pair:
    """Found and wanted latents [B, C, h, w] and pictures uint8 [B, H, W, 3] of one request."""

    latents: tuple[Array, Array]
    images: tuple[Array, Array]


@torch.no_grad()
def sample_both(runtime: SanaRuntime, pipeline: Any, request: Request) -> Pair:
    """Sample one request, as complete as `call_reference` asks for, with the bundle and with diffusers."""
    plan = runtime.plan(request)
    *_, last = runtime.steps(plan, runtime.encode(plan))
    found = np.array(runtime.backend.to_host(last.latents))
    pictures = runtime.decode(plan, last.latents)

    wanted = call_reference(pipeline, request, plan.seeds[0], output_type="latent")
    image = pipeline.vae.decode(wanted / pipeline.vae.config.scaling_factor).sample
    if bins_resolution(request, runtime.manifest.model.sample_size):
        image = pipeline.image_processor.resize_and_crop_tensor(image, plan.output_width, plan.output_height)
    reference = pipeline.image_processor.postprocess(image, output_type="pil")
    return Pair((found, wanted.numpy()), (np.stack([*map(np.asarray, pictures)]), np.stack([*map(np.asarray, reference)])))


@torch.no_grad()
def measure_ranges(
    bundle: Path,
    sampling: Sampling = Sampling(),
    *,
    threads: int | None = None,
    on_progress: Progress = lambda doing, done, total: None,
) -> RangeReport:
    """Sample the prompts in float32 with the bundle's half-precision graphs and report how large every tensor gets.

    Raises UsageError for an fp32 bundle, which stores nothing in half precision.
    """
    manifest = Manifest.load(bundle)
    if manifest.options.precision == "fp32":
        raise UsageError(
            f"{bundle} stores nothing in half precision",
            found="fp32",
            wanted="fp16 or bf16",
            fix=export_line(bundle.with_name(f"{bundle.name}-fp16"), manifest, precision="fp16") + " --dtype fp16",
        )
    runtime = SanaRuntime.from_pretrained(
        bundle, backend=evaluator_backend(partial(RangeMeter, threads=threads), "float32 with ranges")
    )
    evaluators = cast(EvaluatorBackend, runtime.backend).evaluators
    prompts = sampling.prompts
    for done, prompt in enumerate(prompts):
        on_progress(f"sampling {prompt!r}", done, len(prompts))
        plan = runtime.plan(sampling.request(prompt, manifest.model))
        *_, last = runtime.steps(plan, runtime.encode(plan))
        # Not runtime.decode, which refuses latents that overflowed: here that is what is looked for.
        runtime.run("vae_decoder", {"latents": last.latents})
    rows = [row for evaluator in evaluators.values() for row in cast(RangeMeter, evaluator).ranges()]
    return RangeReport(str(bundle), tuple(prompts), tuple(sorted(rows, key=lambda row: row.headroom)))
