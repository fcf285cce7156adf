"""One check for each deployment graph: its output in a loaded bundle next to what diffusers computes from the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sana_export.export.example_inputs import CHECK_SIZES, random_inputs
from sana_export.formats.arrays import Array
from sana_export.runtime import SanaRuntime
from sana_export.runtime.noise import TorchGenerator, randn_batch
from sana_export.runtime.request import Request
from sana_export.runtime.resolution import make_resize_plan
from sana_export.runtime.sampling import sampler_feeds
from sana_export.verify.reference import call_reference

#: Of a size that is brought within what the backend serves: the checks that use it depend on none.
_REQUEST = Request(prompt="", height=256, width=256, use_resolution_binning=False, guidance_scale=4.5)


def _check_text_encoder(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """The kept rows of every prompt, with the instruction, and of the empty negative prompt where there is one.

    As many prompts at a time as the backend serves.
    """
    most = _served(runtime, "text_encoder", "batch", len(prompts))
    found: list[Array] = []
    reference: list[Array] = []
    for first in range(0, len(prompts), most):
        some = list(prompts[first : first + most])
        plan = runtime.plan(replace(_request(runtime), prompt=some))
        encoded = runtime.embed(plan)
        instruction = runtime.manifest.model.instruction.split("\n")
        wanted = pipeline.encode_prompt(some, complex_human_instruction=instruction)
        # Embeddings and mask of the prompts, then of the negative prompts, which our branches begin with.
        branches = [embeds[mask.bool()] for embeds, mask in zip(wanted[::2], wanted[1::2], strict=True)]
        found.append(encoded.gather(runtime.to_host)[encoded.context_mask > 0])
        reference.append(torch.cat(branches[::-1]).numpy())
    return np.concatenate(found), np.concatenate(reference)


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
    timesteps = runtime.plan(_request(runtime)).schedule.timesteps
    inputs["timestep"] = torch.from_numpy(timesteps[[seed % len(timesteps)]])
    latents, mask = inputs["latents"], inputs["context_mask"]
    context = runtime.run("context", {"prompt_embeds": embeds.numpy()})["context"]
    feeds = {name: value.numpy() for name, value in inputs.items() if name != "context"}
    found = runtime.run("denoiser", {**feeds, "context": context})["noise_pred"]
    branches, batch = mask.shape[:2]
    guidance = {}
    if runtime.manifest.model.guidance_embeds:
        scaled = inputs["guidance"] * pipeline.transformer.config.guidance_embeds_scale
        guidance["guidance"] = scaled.expand(branches * batch)
    wanted = pipeline.transformer(
        latents.repeat(branches, 1, 1, 1),
        encoder_hidden_states=embeds.flatten(0, 1),
        encoder_attention_mask=mask.flatten(0, 1),
        timestep=inputs["timestep"].expand(branches * batch),
        **guidance,
    ).sample
    return runtime.to_host(found), wanted.unflatten(0, (branches, batch)).numpy()


def _check_sampler(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """A whole trajectory of the pipeline's own loop with random predictions in place of its transformer's, with guidance."""
    request = replace(_request(runtime), num_inference_steps=runtime.manifest.model.default_steps)
    plan = runtime.plan(request)
    shape, schedule, (steps, branches) = plan.latents_shape, plan.schedule, plan.guidance_weights.shape
    # Of another seed than the noise, from which a prediction could not be told otherwise.
    predictions = torch.randn((steps, branches, *shape), generator=torch.Generator().manual_seed(seed + 1))

    generator = TorchGenerator(seed)
    latents = randn_batch(shape, generator) * np.float32(schedule.initial_noise_scale)
    x0 = noise = np.zeros(shape, np.float32)
    for index, prediction in enumerate(predictions):
        if schedule.needs_noise:
            noise = randn_batch(shape, generator)
        found = _run(
            runtime,
            "sampler",
            sampler_feeds(prediction.numpy(), latents, x0, noise, schedule.coefficients[index], plan.guidance_weights[index]),
        )
        latents, x0 = found["next_latents"], found["x0"]

    answers = iter(predictions.flatten(1, 2))
    with replaced_forward(pipeline.transformer, lambda *_, **__: (next(answers),)):
        wanted = call_reference(pipeline, request, seed, output_type="latent")
    return latents, wanted.numpy()


@contextlib.contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` meanwhile."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own is found again


def _check_vae_decoder(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    inputs = _inputs(runtime, "vae_decoder", seed)
    wanted = pipeline.vae.decode(inputs["latents"] / pipeline.vae.config.scaling_factor).sample
    return _run(runtime, "vae_decoder", inputs)["image"], wanted.numpy()


def _check_vae_decoder_head(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """Its features, through the tail in one window."""
    return _check_decoder_parts(runtime, pipeline, seed, tile=1024)


def _check_vae_decoder_tail(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """In windows that are put together."""
    return _check_decoder_parts(runtime, pipeline, seed, tile=128)


def _check_decoder_parts(runtime: SanaRuntime, pipeline: Any, seed: int, tile: int) -> tuple[Array, Array]:
    plan = runtime.plan(replace(_request(runtime), decoder_tile=tile))
    latents = torch.randn(plan.latents_shape, generator=torch.Generator().manual_seed(seed))
    wanted = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return runtime.to_host(runtime.decode_raw(plan, latents.numpy())), wanted.numpy()


def _check_postprocess(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """A resize and crop as after resolution binning."""
    images, height, width = (
        _served(runtime, "postprocess", axis, value) for axis, value in (("batch", 2), ("image_height", 96), ("image_width", 160))
    )
    output_height, output_width = height + 4, width - 10
    image = torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(seed)).clamp(-1.5, 1.5)
    tables = vars(make_resize_plan(height, width, output_height, output_width))
    resized = pipeline.image_processor.resize_and_crop_tensor(image, output_width, output_height)
    pictures = pipeline.image_processor.postprocess(resized, output_type="pil")
    return _run(runtime, "postprocess", {"image": image, **tables})["pixels"], np.stack([*map(np.asarray, pictures)])


GRAPH_CHECKS: dict[str, Callable[[SanaRuntime, Any, Sequence[str], int], tuple[Array, Array]]] = {
    "text_encoder": _check_text_encoder,
    "context": _check_context,
    "denoiser": _check_denoiser,
    "sampler": _check_sampler,
    "vae_decoder": _check_vae_decoder,
    "vae_decoder_head": _check_vae_decoder_head,
    "vae_decoder_tail": _check_vae_decoder_tail,
    "postprocess": _check_postprocess,
}


def _request(runtime: SanaRuntime) -> Request:
    pixels = runtime.manifest.model.vae_scale_factor
    height, width = (
        _served(runtime, "denoiser", f"latent_{side}", getattr(_REQUEST, side) // pixels) * pixels for side in ("height", "width")
    )
    return replace(_REQUEST, height=height, width=width)


def _inputs(runtime: SanaRuntime, graph: str, seed: int) -> dict[str, torch.Tensor]:
    lengths = {axis: _served(runtime, graph, axis, CHECK_SIZES.of(axis)) for axis in vars(CHECK_SIZES) if axis != "spatial_ratio"}
    sizes = replace(CHECK_SIZES, **lengths, spatial_ratio=runtime.manifest.model.vae_scale_factor)
    return random_inputs(runtime.manifest.graphs[graph].spec, sizes, seed)


def _served(runtime: SanaRuntime, graph: str, axis: str, length: int) -> int:
    """The length next to `length` that the backend serves."""
    lowest, _, highest = (runtime.backend.ranges(graph) or {}).get(axis, (length, length, length))
    return min(max(length, lowest), highest)


def _run(runtime: SanaRuntime, graph: str, inputs: dict[str, Any]) -> dict[str, Array]:
    feeds = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    outputs = runtime.run(graph, feeds)
    return {name: runtime.to_host(value) for name, value in outputs.items()}
