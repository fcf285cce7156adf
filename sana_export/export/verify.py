"""The proof of a bundle: every graph and whole pictures against diffusers and transformers in float32.

On a CPU a half-precision bundle runs in the storage evaluator (evaluator.py), because ONNX Runtime would hide its overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana_export.disk import locked, manifest_lock
from sana_export.errors import UsageError
from sana_export.export.evaluator import Range, RangeMeter, StorageEvaluator
from sana_export.export.modules import CHECK_SIZES, random_inputs
from sana_export.export.parity import Array, Parity, compare_images, compare_tensors
from sana_export.export.reference import load_reference
from sana_export.graphs.checkpoint import SanaCheckpoint
from sana_export.manifest import Manifest, check_files
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import AUTO, open_backend
from sana_export.runtime.prompt import PromptEncoder
from sana_export.runtime.rebuild import export_line
from sana_export.runtime.request import Request

PROMPTS = ("a red apple on a table", "一只可爱的熊猫在吃竹子", "A cute 🐼 eating 🎋, ink drawing style", "")
PAG_SCALE = 2.0
SIZE = 256

#: Called with what is about to be done, the count of steps done and of all steps.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VerifyReport:
    """Parity of one bundle. `graphs` has a row an output, `latents` and `images` a row a sampled prompt."""

    bundle: str
    reference: str
    precision: str
    backend: str
    graphs: tuple[Parity, ...]
    latents: tuple[Parity, ...]
    images: tuple[Parity, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in (*self.graphs, *self.images))

    def as_json(self) -> dict[str, Any]:
        rows = {kind: [row.as_json() for row in getattr(self, kind)] for kind in ("graphs", "latents", "images")}
        head = {key: getattr(self, key) for key in ("bundle", "reference", "precision", "backend", "passed")}
        return {**head, **rows}

    def as_text(self) -> str:
        rows = [*self.graphs, *self.latents, *self.images]
        width = max(len(row.name) for row in rows)
        lines = [f"{self.bundle} ({self.precision}, {self.backend}) against {self.reference} in fp32"]
        for row in rows:
            mark = "ok    " if row.passed else "MISSED"
            identical = "" if row.identical is None else f"  identical {row.identical:.4%}"
            lines.append(
                f"  {mark} {row.name:{width}}  cosine {row.cosine:.9f}  psnr {row.psnr_db:6.1f} dB  max {row.max_abs:.3g}"
                f"{identical}  (limit: {row.limit})"
            )
        lines.append("passed" if self.passed else "NOT passed")
        return "\n".join(lines)


@dataclass(frozen=True)
class RangeReport:
    """The largest magnitude of every half-precision tensor of a bundle over some prompts, the least headroom first."""

    bundle: str
    prompts: tuple[str, ...]
    rows: tuple[Range, ...]

    def as_json(self) -> dict[str, Any]:
        rows = [{**vars(row), "headroom": min(row.headroom, 1e30)} for row in self.rows]
        return {"bundle": self.bundle, "prompts": list(self.prompts), "ranges": rows}

    def as_text(self, count: int = 20) -> str:
        lines = [f"{self.bundle}: largest magnitudes over {len(self.prompts)} prompts, least headroom first"]
        lines += [
            f"  {row.largest:12.5g}  headroom {row.headroom:10.3g}  {row.graph}: {row.operator} {row.tensor} ({row.dtype})"
            for row in self.rows[:count]
        ]
        overflows = sum(row.headroom < 1 for row in self.rows)
        return "\n".join([*lines, f"{overflows} of {len(self.rows)} tensors pass the largest number of their dtype"])


class EvaluatorBackend:
    """The runtime's backend interface over evaluators of this package: `evaluator` makes a session from an ONNX file."""

    device = "cpu"

    def __init__(self, bundle: Path, manifest: Manifest, evaluator: type[StorageEvaluator] | type[RangeMeter], name: str) -> None:
        self.bundle, self.manifest, self.name = bundle, manifest, name
        self._evaluator = evaluator
        self.sessions: dict[str, Any] = {}

    def load(self, graph: str) -> Any:
        path, *_ = check_files(self.bundle, self.manifest.graphs[graph].files, fix=export_line(self.bundle, self.manifest))
        self.sessions[graph] = self._evaluator(path)
        return self.sessions[graph]

    def to_device(self, array: Array) -> Array:
        return array

    def to_host(self, value: Array) -> Array:
        return value


def open_runtime(bundle: Path, backend: str = AUTO) -> SanaRuntime:
    """The bundle in `backend`; for "auto" a half-precision bundle is evaluated with its intermediates stored in half precision."""
    manifest = Manifest.load(bundle)
    opened: Any
    if backend == AUTO and manifest.options.precision != "fp32":
        opened = EvaluatorBackend(bundle, manifest, StorageEvaluator, f"cpu, {manifest.options.dtype} intermediates")
    else:
        opened = open_backend(backend, bundle, manifest)
    return _runtime(bundle, manifest, opened)


def _runtime(bundle: Path, manifest: Manifest, backend: Any) -> SanaRuntime:
    fix = export_line(bundle, manifest)
    check_files(bundle, manifest.files, fix=fix)
    return SanaRuntime(bundle, manifest, PromptEncoder.load(bundle, manifest, fix=fix), backend)


@torch.no_grad()
def verify_bundle(
    bundle: Path,
    checkpoint: SanaCheckpoint,
    *,
    backend: str = AUTO,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int = 8,
    guidance_scale: float = 4.5,
    seed: int = 0,
    on_progress: Progress = lambda doing, done, total: None,
) -> VerifyReport:
    """Compare every graph on fresh inputs, then sample every prompt with both and compare latents and pictures.

    Sizes default to 256 px, sampled without resolution binning. A bundle with PAG layers is sampled with PAG as well. The report is
    kept in the bundle's manifest. Raises UsageError where `checkpoint` is not the one that the bundle was made from.
    """
    runtime = open_runtime(bundle, backend)
    manifest = runtime.manifest
    if checkpoint.sha256 != manifest.checkpoint.sha256:
        raise UsageError(
            f"{bundle} was not exported from {checkpoint.source}",
            found=f"weights and configs of hash {checkpoint.sha256[:16]}",
            wanted=f"{manifest.checkpoint.source}, of hash {manifest.checkpoint.sha256[:16]}",
            fix=export_line(bundle, manifest),
        )
    prompts = tuple(prompts or PROMPTS)
    scales = [0.0, PAG_SCALE] if manifest.options.pag_layers else [0.0]
    total = len(GRAPH_CHECKS) + len(prompts) * len(scales)
    pipeline = load_reference(checkpoint, manifest.options, pag=False)
    graphs: list[Parity] = []
    for done, (name, check) in enumerate(GRAPH_CHECKS.items()):
        on_progress(name, done, total)
        found, wanted = check(runtime, pipeline, prompts, seed)
        graphs.append(compare_tensors(name, found, wanted, manifest.options.precision))
    latents: list[Parity] = []
    images: list[Parity] = []
    for scale in scales:
        reference = load_reference(checkpoint, manifest.options, pag=True) if scale else pipeline
        for prompt in prompts:
            on_progress(f"sampling {prompt!r}" + (" with PAG" if scale else ""), len(graphs) + len(images), total)
            request = Request(
                prompt=prompt,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                pag_scale=scale,
                height=height or SIZE,
                width=width or SIZE,
                seed=seed,
                use_resolution_binning=False,
            )
            pair = sample_both(runtime, reference, request)
            name = f"{prompt[:24]!r}" + (f" pag {scale:g}" if scale else "")
            latents.append(compare_tensors(f"latents {name}", *pair.latents, manifest.options.precision))
            images.append(compare_images(f"image {name}", *pair.images, manifest.options.precision))
    report = VerifyReport(
        str(bundle),
        checkpoint.source,
        manifest.options.precision,
        runtime.backend.name,
        tuple(graphs),
        tuple(replace(row, passed=True, limit="none: the picture counts") for row in latents),
        tuple(images),
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
    """Sample one request with the bundle and with diffusers."""
    plan = runtime.plan(request)
    *_, last = runtime.steps(plan, runtime.encode(plan))
    found = np.array(runtime.backend.to_host(last.latents))
    pictures = runtime.decode(plan, last.latents)

    shared = ("prompt", "negative_prompt", "height", "width", "num_images_per_prompt", "use_resolution_binning")
    options = {name: getattr(request, name) for name in shared}
    if request.pag_scale:
        options["pag_scale"] = request.pag_scale
    wanted = pipeline(
        **options,
        num_inference_steps=request.num_inference_steps or runtime.manifest.model.default_steps,
        guidance_scale=runtime.manifest.model.default_guidance_scale if request.guidance_scale is None else request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(plan.seeds[0]),
        output_type="latent",
    ).images
    image = pipeline.vae.decode(wanted / pipeline.vae.config.scaling_factor).sample
    if request.use_resolution_binning:
        image = pipeline.image_processor.resize_and_crop_tensor(image, plan.output_width, plan.output_height)
    reference = pipeline.image_processor.postprocess(image, output_type="pil")
    return Pair((found, wanted.numpy()), (np.stack([*map(np.asarray, pictures)]), np.stack([*map(np.asarray, reference)])))


@torch.no_grad()
def measure_ranges(
    bundle: Path,
    *,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int = 8,
    guidance_scale: float = 4.5,
    seed: int = 0,
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
            fix=f"sana-export export {manifest.checkpoint.source} -o {bundle}-fp16 --dtype fp16",
        )
    backend = EvaluatorBackend(bundle, manifest, RangeMeter, "float32 with ranges")
    runtime = _runtime(bundle, manifest, backend)
    prompts = tuple(prompts or PROMPTS)
    for done, prompt in enumerate(prompts):
        on_progress(f"sampling {prompt!r}", done, len(prompts))
        plan = runtime.plan(
            Request(
                prompt=prompt,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height or SIZE,
                width=width or SIZE,
                seed=seed,
                use_resolution_binning=False,
            )
        )
        *_, last = runtime.steps(plan, runtime.encode(plan))
        runtime.decode(plan, last.latents)
    rows = [row for session in backend.sessions.values() for row in session.ranges()]
    return RangeReport(str(bundle), prompts, tuple(sorted(rows, key=lambda row: row.headroom)))


def _check_text_encoder(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """The kept rows of every prompt, with the instruction, and of the empty negative prompt."""
    plan = runtime.plan(Request(prompt=list(prompts), height=SIZE, width=SIZE, use_resolution_binning=False, guidance_scale=2.0))
    tokens = [
        [runtime.text.tokenize(text, max_sequence_length=plan.max_sequence_length, instruct=instruct) for text in texts]
        for texts, instruct in plan.texts
    ]
    encoded = runtime.text.encode(tokens, runtime._run_text_encoder)
    positive, positive_mask, negative, negative_mask = pipeline.encode_prompt(
        list(prompts), True, complex_human_instruction=runtime.manifest.model.instruction.split("\n")
    )
    wanted = torch.cat([negative[negative_mask.bool()], positive[positive_mask.bool()]])
    return encoded.prompt_embeds[encoded.context_mask > 0], wanted.numpy()


def _check_context(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    transformer = pipeline.transformer
    inputs = _inputs(runtime, "context", seed)
    embeds = inputs["prompt_embeds"]
    captions = transformer.caption_norm(transformer.caption_projection(embeds))
    layers = []
    for block in transformer.transformer_blocks:
        attention = block.attn2
        key, value = attention.to_k(captions), attention.to_v(captions)
        key = attention.norm_k(key) if attention.norm_k is not None else key
        heads = (*key.shape[:-1], attention.heads, -1)
        factor = (key.shape[-1] // attention.heads) ** -0.5
        layers.append(torch.stack([tensor.view(heads).transpose(2, 3) for tensor in (key * factor, value)]))
    return _run(runtime, "context", inputs)["context"], torch.stack(layers).numpy()


def _check_denoiser(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """Every branch without perturbation, prompts of unequal length in one batch; the graph `context` feeds it."""
    embeds = _inputs(runtime, "context", seed + 1)["prompt_embeds"]
    inputs = _inputs(runtime, "denoiser", seed + 1)
    inputs["perturbed"] = torch.zeros_like(inputs["perturbed"])
    inputs["timestep"] = inputs["timestep"].round()
    latents, mask = inputs["latents"], inputs["context_mask"]
    context = runtime._sessions["context"].run({"prompt_embeds": embeds.numpy()})["context"]
    feeds = {name: value.numpy() for name, value in inputs.items() if name != "context"}
    found = runtime._sessions["denoiser"].run({**feeds, "context": context})["noise_pred"]
    branches, batch = mask.shape[:2]
    wanted = pipeline.transformer(
        latents.repeat(branches, 1, 1, 1),
        encoder_hidden_states=embeds.flatten(0, 1),
        encoder_attention_mask=mask.flatten(0, 1),
        timestep=inputs["timestep"].expand(branches * batch),
    ).sample
    return np.array(runtime.backend.to_host(found)), wanted.unflatten(0, (branches, batch)).numpy()


def _check_sampler(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """A whole trajectory of the checkpoint's scheduler under random predictions, with guidance."""
    generator = torch.Generator().manual_seed(seed)
    plan = runtime.plan(Request(prompt="", height=SIZE, width=SIZE, use_resolution_binning=False, guidance_scale=4.5, seed=seed))
    shape = plan.latents_shape
    start = torch.randn(shape, generator=generator)
    predictions = torch.randn((len(plan.schedule.timesteps), 2, *shape), generator=generator)

    latents, x0 = start.numpy(), np.zeros(shape, np.float32)
    for index, prediction in enumerate(predictions):
        found = _run(
            runtime,
            "sampler",
            {
                "noise_pred": prediction,
                "latents": latents,
                "previous_x0": x0,
                "noise": np.zeros(shape, np.float32),
                "coefficients": plan.schedule.coefficients[index],
                "weights": plan.weights[index],
            },
        )
        latents, x0 = found["next_latents"], found["x0"]
    scheduler, wanted = pipeline.scheduler, start
    scheduler.set_timesteps(len(predictions))
    for timestep, (negative, positive) in zip(scheduler.timesteps, predictions, strict=True):
        guided = negative + 4.5 * (positive - negative)
        wanted = scheduler.step(guided, timestep, wanted, return_dict=False)[0]
    return latents, wanted.numpy()


def _check_vae_decoder(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    inputs = _inputs(runtime, "vae_decoder", seed)
    wanted = pipeline.vae.decode(inputs["latents"] / pipeline.vae.config.scaling_factor).sample
    return _run(runtime, "vae_decoder", inputs)["image"], wanted.numpy()


def _check_postprocess(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """A resize and crop as after resolution binning."""
    from sana_export.runtime.resolution import make_resize_plan

    image = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(seed)).clamp(-1.5, 1.5)
    tables = vars(make_resize_plan(96, 160, 100, 150))
    resized = pipeline.image_processor.resize_and_crop_tensor(image, 150, 100)
    pictures = pipeline.image_processor.postprocess(resized, output_type="pil")
    return _run(runtime, "postprocess", {"image": image, **tables})["pixels"], np.stack([*map(np.asarray, pictures)])


GRAPH_CHECKS: dict[str, Callable[[SanaRuntime, Any, Sequence[str], int], tuple[Array, Array]]] = {
    "text_encoder": _check_text_encoder,
    "context": _check_context,
    "denoiser": _check_denoiser,
    "sampler": _check_sampler,
    "vae_decoder": _check_vae_decoder,
    "postprocess": _check_postprocess,
}


def _inputs(runtime: SanaRuntime, graph: str, seed: int) -> dict[str, torch.Tensor]:
    sizes = replace(CHECK_SIZES, spatial_ratio=runtime.manifest.model.vae_scale_factor)
    return random_inputs(runtime.manifest.graphs[graph].spec, sizes, seed)


def _run(runtime: SanaRuntime, graph: str, inputs: dict[str, Any]) -> dict[str, Array]:
    feeds = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    outputs = runtime._sessions[graph].run(feeds)
    return {name: np.array(runtime.backend.to_host(value)) for name, value in outputs.items()}
