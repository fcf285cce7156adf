"""What follows from a request for one checkpoint: sizes, seeds, guidance branches, the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.commands import export_command
from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Float32
from sana_export.manifest import Manifest, ModelInfo
from sana_export.numeric import MAX_IMAGES
from sana_export.profiles import DECODER_TILE, UNTILED_AREA
from sana_export.resolutions import Size
from sana_export.runtime.control import CONTROLNET_GRAPHS, ControlImages, plan_control
from sana_export.runtime.guidance import WHOLE, Branches, Guidance, Segment, check_intervals, make_guidance, unguided
from sana_export.runtime.image_start import STRENGTH, ImageStart, first_step, plan_image_start
from sana_export.runtime.inputs import (
    MAX_PIXELS,
    checked_latents,
    checked_seeds,
    given_embeddings,
    instruction_text,
    negative_prompts,
    texts,
)
from sana_export.runtime.memory import DENOISING_STAGE
from sana_export.runtime.missing_graphs import no_controlnet, no_encoder
from sana_export.runtime.prompt import GivenEmbeddings
from sana_export.runtime.request import Request, bins_resolution
from sana_export.runtime.resolution import ResizePlan, check_size, choose_bin, make_resize_plan
from sana_export.runtime.schedule import (
    Schedule,
    SprintAngles,
    evaluations,
    make_schedule,
)
from sana_export.runtime.scheduler_choice import choose_scheduler


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked request and what follows from it for one checkpoint. B images, K guidance branches, N steps."""

    #: For each branch of `branches.texts`: its prompts, one for each of the request's, and the instruction before them, "" for
    #: none. No prompts for a branch in `embeddings`.
    texts: tuple[tuple[tuple[str, ...], str], ...]
    #: The branches whose embeddings the caller gave, by number.
    embeddings: Mapping[int, GivenEmbeddings]
    images_per_prompt: int
    max_sequence_length: int
    #: [B, C, h, w] as sampled.
    latents_shape: tuple[int, int, int, int]
    #: What to start from; None for noise.
    latents: Float32 | None
    #: One, or one for each image.
    seeds: tuple[int, ...]
    schedule: Schedule
    #: The scheduler's config: `_class_name`, and all keys that sampling reads.
    scheduler: Mapping[str, Any]
    #: All branches that run at any step.
    branches: Branches
    #: The branches that run at each step.
    segments: tuple[Segment, ...]
    #: float32 [N, K]: the weight of each branch's prediction at each step; 0 where the branch does not run.
    guidance_weights: Float32
    #: float32 [1]: the guidance scale as an input of the denoiser; None if the denoiser has no such input.
    guidance: Float32 | None
    #: How the sampled image becomes the delivered one.
    resize: ResizePlan
    #: Height of the delivered images in pixels.
    output_height: int
    #: Width of the delivered images in pixels.
    output_width: int
    #: One of `OUTPUT_TYPES`.
    output_type: str
    #: Side of a decoder tile in image pixels; 0 for one piece.
    decoder_tile: int
    #: What to start from if the request has an image.
    image: ImageStart | None = None
    #: What a ControlNet follows if the request has a control image.
    control: ControlImages | None = None
    #: Draws the fresh noise of a step, float32 of `latents_shape`. None: it comes from the seeds.
    draw_noise: Callable[[], Float32] | None = None

    @property
    def always_guided(self) -> bool:
        """Whether all steps run the same branches with a prompt of their own."""
        return all(part.branches.texts == self.branches.texts for part in self.segments)

    @property
    def one_image(self) -> Plan:
        """The plan to decode one of the images alone."""
        return replace(self, latents_shape=(1, *self.latents_shape[1:]))

    @property
    def decoder_graphs(self) -> tuple[str, ...]:
        """The graphs that decode the latents."""
        if self.output_type == "latent":
            return ()
        return ("vae_decoder_head", "vae_decoder_tail") if self.decoder_tile else ("vae_decoder",)

    @property
    def loop_graphs(self) -> tuple[str, ...]:
        """The graphs that run in every step."""
        controlled = () if self.control is None else ("controlnet",)
        return (*controlled, *DENOISING_STAGE, *(() if self.image is None else self.image.loop_graphs))

    @property
    def image_graphs(self) -> tuple[str, ...]:
        """The graphs that only a plan with an image or a control image needs."""
        started = () if self.image is None else (*self.image.encoder_graphs, *self.image.loop_graphs)
        controlled = () if self.control is None else (*self.control.encoder_graphs, *CONTROLNET_GRAPHS)
        return tuple(dict.fromkeys((*started, *controlled)))


def make_plan(request: Request, bundle: Path, manifest: Manifest) -> Plan:
    """The plan of `request` for the checkpoint of `manifest`.

    Raises UsageError, saying what is possible, and ArtifactError if the bundle lacks the graphs that decode in tiles.
    """
    model = manifest.model
    prompts, given = _prompts(request, model.text_channels)
    count = len(prompts) or len(given["cond"].embeds)
    negatives = negative_prompts(request.negative_prompt, count)
    scheduler = choose_scheduler(request.scheduler, model.scheduler)
    schedule = _schedule(request, scheduler, model.default_steps)
    scale = _default(request.guidance_scale, model.default_guidance_scale)
    if model.guidance_embeds:
        _check_embedded_guidance(request, negatives)
        guidance = unguided(len(schedule.timesteps))
    else:
        guidance = _guidance(scale, request, schedule, bundle, manifest)
    output_height, output_width = (_default(side, model.native_size) for side in (request.height, request.width))
    batch, factor = count * request.num_images_per_prompt, model.vae_scale_factor
    _check_total(batch, output_height, output_width)
    if bins_resolution(request, model.sample_size):
        height, width = choose_bin(output_height, output_width, model.sample_size)
    else:
        check_size(output_height, output_width, factor)
        height, width = output_height, output_width
    shape = (batch, model.latent_channels, height // factor, width // factor)
    conditions = (prompts, instruction_text(request.complex_human_instruction, model.instruction))
    written = {"uncond": (() if "uncond" in given else negatives, "")}
    tile = choose_tile(_checked_tile(request.decoder_tile, model.decoder_tile_scale), height, width)
    plan = Plan(
        texts=tuple(written.get(branch, conditions) for branch in guidance.branches.texts),
        embeddings={index: given[branch] for index, branch in enumerate(guidance.branches.texts) if branch in given},
        images_per_prompt=request.num_images_per_prompt,
        max_sequence_length=_default(request.max_sequence_length, model.max_sequence_length),
        latents_shape=shape,
        latents=None if request.latents is None else checked_latents(request.latents, shape),
        seeds=checked_seeds(request.seed, batch),
        schedule=schedule,
        scheduler=scheduler,
        branches=guidance.branches,
        segments=guidance.segments,
        guidance_weights=guidance.weights,
        guidance=np.array([scale], dtype=np.float32) if model.guidance_embeds else None,
        resize=make_resize_plan(height, width, output_height, output_width),
        output_height=output_height,
        output_width=output_width,
        output_type=request.output_type,
        decoder_tile=tile,
        image=None if request.image is None else _image_start(request, model, schedule, count, (height, width), tile),
        control=None if request.control_image is None else _control(request, model, count, (height, width), tile),
    )
    _check_image_graphs(plan, bundle, manifest)
    if missing := [name for name in plan.decoder_graphs if name not in manifest.graphs]:
        raise ArtifactError(
            f"{bundle} cannot decode an image of {height}x{width} (height x width) in tiles",
            found=f"no {', '.join(missing)}",
            wanted="a bundle with these graphs, or decoder_tile 0 (--decoder-tile 0), which decodes in one piece",
            fix=export_command(bundle, manifest),
        )
    return plan


def _image_start(request: Request, model: ModelInfo, schedule: Schedule, prompts: int, size: Size, tile: int) -> ImageStart:
    """What the request's image, strength and mask mean. `tile` is the decoder's; the encoder's features may be larger."""
    scale = model.encoder_tile_scale
    return plan_image_start(
        request.image,
        () if request.mask is None else request.mask,
        _default(request.strength, STRENGTH),
        schedule,
        prompts=prompts,
        per_prompt=request.num_images_per_prompt,
        size=size,
        output_size=(_default(request.height, model.native_size), _default(request.width, model.native_size)),
        factor=model.vae_scale_factor,
        tile=-(-tile // scale) * scale,
    )


def _control(request: Request, model: ModelInfo, prompts: int, size: Size, tile: int) -> ControlImages:
    """What the request's control image means. `tile` is the decoder's."""
    return plan_control(
        request.control_image,
        request.controlnet_conditioning_scale,
        prompts=prompts,
        per_prompt=request.num_images_per_prompt,
        size=size,
        output_size=(_default(request.height, model.native_size), _default(request.width, model.native_size)),
        tile=-(-tile // model.encoder_tile_scale) * model.encoder_tile_scale,
    )


def _check_image_graphs(plan: Plan, bundle: Path, manifest: Manifest) -> None:
    """Raise ArtifactError if the bundle lacks a graph that the plan's image, mask or control image needs.

    Raises UsageError for a control image and a checkpoint that has no ControlNets.
    """
    if plan.control is not None and manifest.model.guidance_embeds:
        raise UsageError(
            "this is a SANA-Sprint checkpoint, which has no ControlNets",
            found="control_image (--control-image)",
            wanted="no control image",
            fix="leave out control_image (--control-image)",
        )
    if plan.control is not None and (missing := [name for name in CONTROLNET_GRAPHS if name not in manifest.graphs]):
        raise no_controlnet(bundle, manifest, f"no {', '.join(missing)}")
    if missing := [name for name in plan.image_graphs if name not in manifest.graphs]:
        raise no_encoder(bundle, manifest, f"no {', '.join(missing)}")


def request_axes(plan: Plan, manifest: Manifest) -> dict[str, int]:
    """The axes of the plan's tensors (contract.DYNAMIC_AXES) that are known before its prompts are tokenized.

    Those that depend on the branches are of the steps that run the most.
    """
    batch, _, height, width = plan.latents_shape
    factor, scale = manifest.model.vae_scale_factor, manifest.model.decoder_tile_scale
    features = {"height": height * factor // scale, "width": width * factor // scale}
    window = plan.decoder_tile // scale + 2 * manifest.model.decoder_tile_halo
    tiles = {f"tile_{side}": min(window, length) for side, length in features.items()} if plan.decoder_tile else {}
    for source in (plan.image, plan.control):
        if source is not None:
            tiles |= _encoder_axes(source.tile, manifest.model, height * factor, width * factor)
    return {
        "batch": batch,
        **max((part.branches for part in plan.segments), key=lambda branches: len(branches.names)).axes,
        "latent_height": height,
        "latent_width": width,
        "image_height": height * factor,
        "image_width": width * factor,
        **{f"feature_{side}": length for side, length in features.items()},
        **tiles,
        "output_height": plan.output_height,
        "output_width": plan.output_width,
    }


def _encoder_axes(tile: int, model: ModelInfo, height: int, width: int) -> dict[str, int]:
    """The axes of the encoder's tensors for an image of `height` x `width` in tiles of the side `tile`, or in one piece."""
    scale = model.encoder_tile_scale
    encoded = {"height": height // scale, "width": width // scale}
    window = tile // scale + 2 * model.encoder_tile_halo
    windows = {side: min(window, length) for side, length in encoded.items()} if tile else {}
    return {
        **{f"encoded_{side}": length for side, length in encoded.items()},
        **{f"window_{side}": length for side, length in windows.items()},
        **{f"window_image_{side}": length * scale for side, length in windows.items()},
    }


def choose_tile(requested: int | None, height: int, width: int) -> int:
    """The side in pixels of the tiles that an image of `height` x `width` is decoded in; 0 for one piece. None: the default."""
    if requested is not None:
        return requested
    return DECODER_TILE if height * width > UNTILED_AREA else 0


def _schedule(request: Request, scheduler: Mapping[str, Any], default_steps: int) -> Schedule:
    """The schedule of a request's steps, or of its custom timesteps or sigmas; with an image, of those that its strength leaves."""
    custom = request.timesteps is not None or request.sigmas is not None
    make = partial(
        make_schedule,
        scheduler,
        request.num_inference_steps if custom else _default(request.num_inference_steps, default_steps),
        SprintAngles(request.max_timesteps, request.intermediate_timesteps),
        timesteps=request.timesteps,
        sigmas=request.sigmas,
    )
    schedule = make()
    if request.image is None:
        return schedule
    order = evaluations(scheduler)
    steps = -(-len(schedule.timesteps) // order)
    return make(first=order * first_step(steps, _default(request.strength, STRENGTH)))


def _prompts(request: Request, channels: int) -> tuple[tuple[str, ...], dict[str, GivenEmbeddings]]:
    """The prompts, none if the caller gave their embeddings, and the given embeddings of the branches "cond" and "uncond"."""
    rows = {
        "cond": (request.prompt_embeds, request.prompt_attention_mask, "prompt", request.prompt is None),
        "uncond": (
            request.negative_prompt_embeds,
            request.negative_prompt_attention_mask,
            "negative_prompt",
            request.negative_prompt is None or not any(texts("negative_prompt", request.negative_prompt)),
        ),
    }
    given = {
        branch: given_embeddings(name, embeds, mask, channels, alone=alone)
        for branch, (embeds, mask, name, alone) in rows.items()
        if embeds is not None or mask is not None
    }
    prompts = () if "cond" in given else texts("prompt", request.prompt)
    count = len(prompts) or len(given["cond"].embeds)
    if "uncond" in given and len(given["uncond"].embeds) != count:
        raise UsageError(
            "the number of negative prompts does not match the number of prompts",
            found=f"negative_prompt_embeds of {len(given['uncond'].embeds)} prompts for {count} prompts",
            wanted=f"negative_prompt_embeds of {count} prompts",
        )
    return prompts, given


def _check_embedded_guidance(request: Request, negatives: Sequence[str]) -> None:
    """Raise UsageError for parameters that a checkpoint with distilled guidance does not have."""
    for name, given, found, option in (
        ("negative_prompt", any(negatives), request.negative_prompt, " (--negative-prompt)"),
        ("negative_prompt_embeds", request.negative_prompt_embeds is not None, "given", ""),
        ("pag_scale", request.pag_scale != 0, request.pag_scale, " (--pag-scale)"),
        ("pag_adaptive_scale", request.pag_adaptive_scale != 0, request.pag_adaptive_scale, ""),
        ("guidance_interval", request.guidance_interval != WHOLE, request.guidance_interval, " (--guidance-interval)"),
        ("pag_interval", request.pag_interval != WHOLE, request.pag_interval, " (--pag-interval)"),
    ):
        if given:
            raise UsageError(
                f"this checkpoint accepts no {name}: its guidance is distilled into one branch (SANA-Sprint)",
                found=f"{name} {found!r}",
                wanted="only guidance_scale",
                fix=f"leave out {name}{option}",
            )


def _guidance(scale: float, request: Request, schedule: Schedule, bundle: Path, manifest: Manifest) -> Guidance:
    """The guidance at each step. Raises UsageError for PAG without layers for it, and for an interval of guidance that is off."""
    if request.pag_scale > 0 and not manifest.options.pag_layers:
        raise UsageError(
            "this bundle has no layers for perturbed attention guidance",
            found=f"pag_scale {request.pag_scale:g}",
            wanted="pag_scale 0, or a bundle that was exported with --pag-layers",
            fix=export_command(bundle, manifest, pag_layers=(8,)),
        )
    intervals = (request.guidance_interval, request.pag_interval)
    check_intervals(request.guidance_interval, scale > 1, request.pag_interval, request.pag_scale > 0)
    return make_guidance(scale, request.pag_scale, request.pag_adaptive_scale, schedule.timesteps, *intervals)


def _checked_tile(pixels: int | None, scale: int) -> int | None:
    """The requested side of a tile in image pixels. `scale` pixels are one feature, which cannot be divided."""
    if pixels is not None and pixels % scale:
        raise UsageError(
            "decoder_tile does not fit the decoder",
            found=f"{pixels} pixels",
            wanted=f"a multiple of {scale}, or 0 to decode in one piece",
            fix=f"--decoder-tile {max(scale, pixels // scale * scale)}",
        )
    return pixels


def _check_total(images: int, height: int, width: int) -> None:
    """Raise UsageError if the delivered images of one call are too many or too large together."""
    if images > MAX_IMAGES or images * height * width > MAX_PIXELS:
        raise UsageError(
            "a call cannot make that many images of this size",
            found=f"{images} images of {height}x{width} (height x width)",
            wanted=f"at most {MAX_IMAGES} images with {MAX_PIXELS} pixels together",
            fix="make several calls",
        )


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
