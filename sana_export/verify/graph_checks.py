"""One check for each deployment graph: its output in a bundle, and what diffusers computes from the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sana_export.contract import HISTORY
from sana_export.export.example_inputs import CHECK_SIZES, random_inputs
from sana_export.formats.arrays import Array
from sana_export.graphs.numerics import NUMERICS
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.base import DeviceTensor
from sana_export.runtime.control import CONTROLNET_GRAPHS, residuals_shape
from sana_export.runtime.guidance import Branches
from sana_export.runtime.noise import TorchGenerator, randn_batch
from sana_export.runtime.request import Request
from sana_export.runtime.resolution import make_resize_plan
from sana_export.runtime.sampling import sampler_feeds
from sana_export.verify.reference import call_reference

#: Its size is changed to one that the backend supports. The checks that use it work with every size.
_REQUEST = Request(prompt="", height=256, width=256, use_resolution_binning=False, guidance_scale=4.5)


def _check_text_encoder(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """The rows that are kept of every prompt with the instruction, and of the empty negative prompt if there is one.

    It runs as many prompts at a time as the backend supports.
    """
    most = _supported(runtime, "text_encoder", "batch", len(prompts))
    found: list[Array] = []
    reference: list[Array] = []
    for first in range(0, len(prompts), most):
        some = list(prompts[first : first + most])
        plan = runtime.plan(replace(_request(runtime), prompt=some))
        encoded = runtime.embed(plan)
        instruction = runtime.manifest.model.instruction.split("\n")
        wanted = pipeline.encode_prompt(some, complex_human_instruction=instruction)
        # diffusers returns the embeddings and masks of the prompts first. Our branches start with the negative prompts.
        branches = [embeds[mask.bool()] for embeds, mask in zip(wanted[::2], wanted[1::2], strict=True)]
        found.append(encoded.gather(runtime.to_host)[encoded.context_mask > 0])
        reference.append(torch.cat(branches[::-1]).numpy())
    return np.concatenate(found), np.concatenate(reference)


def _check_context(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    return _check_keys_values(runtime, "context", pipeline.transformer, seed)


def _check_controlnet_context(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    return _check_keys_values(runtime, "controlnet_context", pipeline.controlnet, seed)


def _check_keys_values(runtime: SanaRuntime, graph: str, transformer: Any, seed: int) -> tuple[Array, Array]:
    inputs = inputs_for(runtime, graph, seed)
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
    return run_graph(runtime, graph, inputs)[graph], torch.stack(layers).numpy()


def _check_controlnet(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """Its residuals, with prompts of different lengths in one batch. `context` is the output of the graph `controlnet_context`."""
    embeds = inputs_for(runtime, "controlnet_context", seed + 1)["prompt_embeds"]
    found, wanted = _run_controlnet(runtime, pipeline, inputs_for(runtime, "controlnet", seed + 1), embeds, seed + 1)
    return runtime.to_host(found).astype(np.float32) / NUMERICS[runtime.manifest.options.dtype].scale, wanted.numpy()


def _run_controlnet(
    runtime: SanaRuntime, pipeline: Any, inputs: Mapping[str, torch.Tensor], embeds: torch.Tensor, seed: int
) -> tuple[DeviceTensor, torch.Tensor]:
    """The ControlNet's residuals [R, U, B, h, w, C], stored with the graph's factor, and diffusers' without it.

    The latents, the timestep and the mask are those of `inputs`.
    """
    latents, timestep, mask = (inputs[name] for name in ("latents", "timestep", "context_mask"))
    drawn = inputs_for(runtime, "controlnet", seed)
    control, scale = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)), drawn["conditioning_scale"]
    context = runtime.run("controlnet_context", {"prompt_embeds": embeds.numpy()})["controlnet_context"]
    given = {"latents": latents, "timestep": timestep, "context_mask": mask, "control": control, "conditioning_scale": scale}
    feeds = {name: value.numpy() for name, value in given.items()}
    found = runtime.run("controlnet", {**feeds, "context": context})["residuals"]
    branches, batch = mask.shape[:2]
    samples = pipeline.controlnet(
        latents.repeat(branches, 1, 1, 1),
        encoder_hidden_states=embeds.flatten(0, 1),
        encoder_attention_mask=mask.flatten(0, 1),
        timestep=timestep.expand(branches * batch),
        controlnet_cond=control.repeat(branches, 1, 1, 1),
        conditioning_scale=float(scale),
    ).controlnet_block_samples
    return found, torch.stack([*samples]).unflatten(1, (branches, batch)).unflatten(3, tuple(latents.shape[2:]))


def _check_denoiser(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """All branches without perturbation, with prompts of different lengths in one batch.

    `context` is the output of that graph, and `residuals` that of the ControlNet, if there is one. If it cannot run, they are zero.
    """
    embeds = inputs_for(runtime, "context", seed + 1)["prompt_embeds"]
    inputs = inputs_for(runtime, "denoiser", seed + 1)
    inputs["perturbed"] = torch.zeros_like(inputs["perturbed"])
    timesteps = runtime.plan(_request(runtime)).schedule.timesteps
    inputs["timestep"] = torch.from_numpy(timesteps[[seed % len(timesteps)]])
    latents, mask = inputs["latents"], inputs["context_mask"]
    context = runtime.run("context", {"prompt_embeds": embeds.numpy()})["context"]
    texts, batch = mask.shape[:2]
    source = inputs.get("source", torch.arange(texts))
    branches = len(source)
    made, control = {"context": context}, {}
    if "residuals" in inputs and not _runs(runtime, CONTROLNET_GRAPHS):
        shape = residuals_shape(runtime.manifest, latents.shape, Branches(("cond",) * texts))
        assert shape is not None
        made["residuals"] = runtime.backend.zeros(shape, runtime.manifest.options.dtype)
    elif "residuals" in inputs:
        made["residuals"], samples = _run_controlnet(runtime, pipeline, inputs, embeds, seed + 1)
        control["controlnet_block_samples"] = tuple(sample[source].flatten(0, 1).flatten(1, 2) for sample in samples)
    feeds = {name: value.numpy() for name, value in inputs.items() if name not in made}
    found = runtime.run("denoiser", {**feeds, **made})["noise_pred"]
    guidance = {}
    if runtime.manifest.model.guidance_embeds:
        scaled = inputs["guidance"] * pipeline.transformer.config.guidance_embeds_scale
        guidance["guidance"] = scaled.expand(branches * batch)
    wanted = pipeline.transformer(
        latents.repeat(branches, 1, 1, 1),
        encoder_hidden_states=embeds[source].flatten(0, 1),
        encoder_attention_mask=mask[source].flatten(0, 1),
        timestep=inputs["timestep"].expand(branches * batch),
        **guidance,
        **control,
    ).sample
    return runtime.to_host(found), wanted.unflatten(0, (branches, batch)).numpy()


def _check_sampler(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """All steps of diffusers' own sampling loop with guidance, and random predictions instead of the transformer's."""
    request = replace(_request(runtime), num_inference_steps=runtime.manifest.model.default_steps)
    plan = runtime.plan(request)
    shape, schedule, (steps, branches) = plan.latents_shape, plan.schedule, plan.guidance_weights.shape
    # Their seed is not that of the noise: an error that confuses the two must show.
    predictions = torch.randn((steps, branches, *shape), generator=torch.Generator().manual_seed(seed + 1))

    generator = TorchGenerator(seed)
    latents = randn_batch(shape, generator) * np.float32(schedule.initial_noise_scale)
    noise = np.zeros(shape, np.float32)
    history = [noise] * len(HISTORY)
    for index, prediction in enumerate(predictions):
        if schedule.needs_noise:
            noise = randn_batch(shape, generator)
        found = run_graph(
            runtime,
            "sampler",
            sampler_feeds(prediction.numpy(), latents, history, noise, schedule.coefficients[index], plan.guidance_weights[index]),
        )
        latents, history = found["next_latents"], [found["x0"], *history[:-1]]

    given = GivenPredictions(pipeline.transformer, predictions.flatten(1, 2))
    wanted = call_reference(_with_transformer(pipeline, given), request, seed, output_type="latent")
    return latents, wanted.numpy()


class GivenPredictions:
    """Takes the place of a transformer in diffusers' pipeline. Each call returns the next of `predictions`."""

    def __init__(self, transformer: Any, predictions: Iterable[torch.Tensor]) -> None:
        self.config, self.dtype = transformer.config, transformer.dtype
        self._predictions = iter(predictions)

    def __call__(self, *_arguments: Any, **_options: Any) -> tuple[torch.Tensor]:
        return (next(self._predictions),)


def _with_transformer(pipeline: Any, transformer: GivenPredictions) -> Any:
    """A pipeline of the same class and components, with another transformer."""
    other = type(pipeline)(**{**pipeline.components, "transformer": transformer})
    other.set_progress_bar_config(disable=True)
    return other


def _check_vae_decoder(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    inputs = inputs_for(runtime, "vae_decoder", seed)
    wanted = pipeline.vae.decode(inputs["latents"] / pipeline.vae.config.scaling_factor).sample
    return run_graph(runtime, "vae_decoder", inputs)["image"], wanted.numpy()


def _check_vae_decoder_head(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """Its features, decoded by the tail in one window."""
    return _check_decoder_parts(runtime, pipeline, seed, tile=1024)


def _check_vae_decoder_tail(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """Several windows, joined to one image."""
    return _check_decoder_parts(runtime, pipeline, seed, tile=128)


def _check_decoder_parts(runtime: SanaRuntime, pipeline: Any, seed: int, tile: int) -> tuple[Array, Array]:
    plan = runtime.plan(replace(_request(runtime), decoder_tile=tile))
    latents = torch.randn(plan.latents_shape, generator=torch.Generator().manual_seed(seed))
    wanted = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return runtime.to_host(runtime.decode_raw(plan, latents.numpy())), wanted.numpy()


def _check_postprocess(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """A resize and crop, as it follows resolution binning."""
    images, height, width = (
        _supported(runtime, "postprocess", axis, value)
        for axis, value in (("batch", 2), ("image_height", 96), ("image_width", 160))
    )
    output_height, output_width = height + 4, width - 10
    image = torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(seed)).clamp(-1.5, 1.5)
    tables = vars(make_resize_plan(height, width, output_height, output_width))
    resized = pipeline.image_processor.resize_and_crop_tensor(image, output_width, output_height)
    wanted = pipeline.image_processor.postprocess(resized, output_type="pil")
    return run_graph(runtime, "postprocess", {"image": image, **tables})["pixels"], np.stack([*map(np.asarray, wanted)])


def _check_vae_encoder(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    return _check_encoder(runtime, pipeline, seed, tile=0)


def _check_vae_encoder_head(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """The features of several windows, encoded by the tail."""
    return _check_encoder(runtime, pipeline, seed, tile=128)


def _check_vae_encoder_tail(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    """The features of the head, from one window."""
    return _check_encoder(runtime, pipeline, seed, tile=1024)


def _check_encoder(runtime: SanaRuntime, pipeline: Any, seed: int, tile: int) -> tuple[Array, Array]:
    request = replace(_request(runtime), decoder_tile=tile)
    size = runtime.plan(request).output_height, runtime.plan(request).output_width
    noise = np.random.default_rng(seed).random((*size, 3), dtype=np.float32)
    plan = runtime.plan(replace(request, image=noise, strength=1.0))
    image = torch.from_numpy(noise).permute(2, 0, 1)[None] * 2 - 1
    wanted = pipeline.vae.encode(image).latent * pipeline.vae.config.scaling_factor
    return runtime.encode_image(plan), wanted.numpy()


def _check_blend(runtime: SanaRuntime, pipeline: Any, prompts: Sequence[str], seed: int) -> tuple[Array, Array]:
    inputs = inputs_for(runtime, "blend", seed)
    level, mask = inputs["noise_level"], inputs["mask"]
    noised = (1 - level) * inputs["image_latents"] + level * inputs["noise"]
    wanted = (1 - mask) * noised + mask * inputs["latents"]
    return run_graph(runtime, "blend", inputs)["blended"], wanted.numpy()


GRAPH_CHECKS: dict[str, Callable[[SanaRuntime, Any, Sequence[str], int], tuple[Array, Array]]] = {
    "text_encoder": _check_text_encoder,
    "context": _check_context,
    "denoiser": _check_denoiser,
    "sampler": _check_sampler,
    "vae_decoder": _check_vae_decoder,
    "vae_decoder_head": _check_vae_decoder_head,
    "vae_decoder_tail": _check_vae_decoder_tail,
    "postprocess": _check_postprocess,
    "controlnet_context": _check_controlnet_context,
    "controlnet": _check_controlnet,
    "vae_encoder": _check_vae_encoder,
    "vae_encoder_head": _check_vae_encoder_head,
    "vae_encoder_tail": _check_vae_encoder_tail,
    "blend": _check_blend,
}


def _runs(runtime: SanaRuntime, graphs: Iterable[str]) -> bool:
    """Whether the bundle and its backend have all of `graphs`."""
    return all(name in runtime.manifest.graphs and runtime.backend.ranges(name) is not None for name in graphs)


def _request(runtime: SanaRuntime) -> Request:
    pixels = runtime.manifest.model.vae_scale_factor
    height, width = (
        _supported(runtime, "denoiser", f"latent_{side}", getattr(_REQUEST, side) // pixels) * pixels
        for side in ("height", "width")
    )
    return replace(_REQUEST, height=height, width=width)


def inputs_for(runtime: SanaRuntime, graph: str, seed: int) -> dict[str, torch.Tensor]:
    lengths = {
        axis: _supported(runtime, graph, axis, CHECK_SIZES.of(axis))
        for axis in vars(CHECK_SIZES)
        if axis not in ("spatial_ratio", "encoder_scale")
    }
    sizes = replace(CHECK_SIZES, **lengths, spatial_ratio=runtime.manifest.model.vae_scale_factor)
    return random_inputs(runtime.manifest.graphs[graph].spec, sizes, seed)


def _supported(runtime: SanaRuntime, graph: str, axis: str, length: int) -> int:
    """The length nearest to `length` that the backend supports."""
    lowest, _, highest = (runtime.backend.ranges(graph) or {}).get(axis, (length, length, length))
    return min(max(length, lowest), highest)


def run_graph(runtime: SanaRuntime, graph: str, inputs: dict[str, Any]) -> dict[str, Array]:
    feeds = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    outputs = runtime.run(graph, feeds)
    return {name: runtime.to_host(value) for name, value in outputs.items()}
