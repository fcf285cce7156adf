"""A request, and the plan that follows from it for one checkpoint: sizes, seeds, guidance branches, the schedule."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.commands import export_command
from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Float32
from sana_export.manifest import Manifest
from sana_export.profiles import DECODER_TILE, UNTILED_AREA
from sana_export.resolutions import BINS
from sana_export.runtime.noise import TorchGenerator
from sana_export.runtime.resolution import ResizePlan, check_size, choose_bin, make_resize_plan
from sana_export.runtime.schedule import Schedule, make_schedule

#: Pixels: twice the longest side of Sana's largest resolution bin. Memory runs out long before.
MAX_SIDE = 16384
OUTPUT_TYPES = ("pil", "np", "latent")
#: With `pag_adaptive_scale`, diffusers lowers PAG by the distance of the timestep from this one.
_FIRST_TIMESTEP = 1000


@dataclass(frozen=True, eq=False)
class Request:
    """The parameters of one call. None means the default of the bundle's checkpoint.

    Names, defaults and meanings are those of diffusers' SanaPipeline and SanaPAGPipeline, or of SanaSprintPipeline for a
    SANA-Sprint checkpoint.
    """

    #: One text, or a list of texts.
    prompt: str | Sequence[str]
    #: One text for all prompts, or one for each. Unused without guidance. A SANA-Sprint checkpoint accepts none.
    negative_prompt: str | Sequence[str] = ""
    #: Number of sampling steps.
    num_inference_steps: int | None = None
    #: Above 1: classifier-free guidance. A SANA-Sprint checkpoint reads any value itself.
    guidance_scale: float | None = None
    #: Above 0: perturbed attention guidance (PAG) in the layers that the bundle was exported with. A SANA-Sprint checkpoint accepts
    #: only 0.
    pag_scale: float = 0.0
    #: Lowers `pag_scale` at later steps.
    pag_adaptive_scale: float = 0.0
    #: Height of the delivered images in pixels.
    height: int | None = None
    #: Width of the delivered images in pixels.
    width: int | None = None
    #: Images for each prompt.
    num_images_per_prompt: int = 1
    #: One seed for all images, as in `torch.Generator("cpu").manual_seed(seed)`, or one for each image. None draws one.
    seed: int | Sequence[int] | None = None
    #: float32 [images, channels, h, w] to start from instead of noise; h and w are the sampled size in latent pixels.
    latents: npt.ArrayLike | None = None
    #: "pil": Pillow images. "np": float32 [images, height, width, 3] in [0, 1], not rounded. "latent": float32 latents.
    output_type: str = "pil"
    #: True: sample at the nearest size that the checkpoint was trained on, then resize and crop. False: sample at this size, in
    #: multiples of the manifest's `vae_scale_factor` (32 for Sana). None: True if the checkpoint has a table of sizes.
    use_resolution_binning: bool | None = None
    #: Encode the prompts after the checkpoint's instruction.
    complex_human_instruction: bool = True
    #: Tokens of a prompt that reach the denoiser. A longer prompt is truncated with a warning.
    max_sequence_length: int | None = None
    #: Side in image pixels of the tiles that the decoder works in: the same values in less memory. 0: one piece. None: one piece up
    #: to 2048x2048 pixels of area, tiles above.
    decoder_tile: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked request and what follows from it for one checkpoint. B images, K guidance branches, N steps."""

    #: For each branch: its prompts, one for each of the request's, and whether the instruction precedes them.
    texts: tuple[tuple[tuple[str, ...], bool], ...]
    images_per_prompt: int
    max_sequence_length: int
    #: [B, C, h, w] as sampled.
    latents_shape: tuple[int, int, int, int]
    #: What to start from; None for noise.
    latents: Float32 | None
    #: One, or one for each image.
    seeds: tuple[int, ...]
    schedule: Schedule
    #: float32 [K]: 1 for the branch with perturbed attention.
    perturbed: Float32
    #: float32 [N, K]: the weight of each branch's prediction at each step.
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

    @property
    def decoder_graphs(self) -> tuple[str, ...]:
        """The graphs that decode the latents."""
        if self.output_type == "latent":
            return ()
        return ("vae_decoder_head", "vae_decoder_tail") if self.decoder_tile else ("vae_decoder",)


def bins_resolution(request: Request, sample_size: int) -> bool:
    """Whether the image is sampled at a size of the checkpoint's table. `sample_size` is that of its transformer config."""
    binning = request.use_resolution_binning
    return sample_size in BINS if binning is None else binning


def make_plan(request: Request, bundle: Path, manifest: Manifest) -> Plan:
    """The plan of `request` for the checkpoint of `manifest`.

    Raises UsageError, saying what is possible, and ArtifactError if the bundle lacks the graphs that decode in tiles.
    """
    model = manifest.model
    prompts = _texts("prompt", request.prompt)
    negatives = _negative_prompts(request.negative_prompt, len(prompts))
    images_per_prompt = _integer("num_images_per_prompt", request.num_images_per_prompt)
    steps = _integer("num_inference_steps", _default(request.num_inference_steps, model.default_steps))
    schedule = make_schedule(model.scheduler, steps)
    scale = _number("guidance_scale", _default(request.guidance_scale, model.default_guidance_scale))
    if model.guidance_embeds:
        _check_embedded_guidance(request, negatives)
        branches, weights = ["cond"], np.ones((steps, 1), dtype=np.float32)
    else:
        branches, weights = _guidance(scale, request, schedule, bundle, manifest)
    output_height = _side("height", _default(request.height, model.native_size))
    output_width = _side("width", _default(request.width, model.native_size))
    if bins_resolution(request, model.sample_size):
        height, width = choose_bin(output_height, output_width, model.sample_size)
    else:
        check_size(output_height, output_width, model.vae_scale_factor)
        height, width = output_height, output_width
    batch, factor = len(prompts) * images_per_prompt, model.vae_scale_factor
    shape = (batch, model.latent_channels, height // factor, width // factor)
    texts = {"uncond": (negatives, False)}
    plan = Plan(
        texts=tuple(texts.get(branch, (prompts, bool(request.complex_human_instruction))) for branch in branches),
        images_per_prompt=images_per_prompt,
        max_sequence_length=_integer("max_sequence_length", _default(request.max_sequence_length, model.max_sequence_length)),
        latents_shape=shape,
        latents=None if request.latents is None else checked_latents(request.latents, shape),
        seeds=_seeds(request.seed, batch),
        schedule=schedule,
        perturbed=np.array([branch == "perturbed" for branch in branches], dtype=np.float32),
        guidance_weights=weights,
        guidance=np.array([scale], dtype=np.float32) if model.guidance_embeds else None,
        resize=make_resize_plan(height, width, output_height, output_width),
        output_height=output_height,
        output_width=output_width,
        output_type=_choice("output_type", request.output_type, OUTPUT_TYPES),
        decoder_tile=choose_tile(_checked_tile(request.decoder_tile, model.decoder_tile_scale), height, width),
    )
    if missing := [name for name in plan.decoder_graphs if name not in manifest.graphs]:
        raise ArtifactError(
            f"{bundle} cannot decode an image of {height}x{width} (height x width) in tiles",
            found=f"no {', '.join(missing)}",
            wanted="a bundle with these graphs, or decoder_tile 0 (--decoder-tile 0), which decodes in one piece",
            fix=export_command(bundle, manifest),
        )
    return plan


def request_axes(plan: Plan, manifest: Manifest) -> dict[str, int]:
    """The axes of the plan's tensors (contract.DYNAMIC_AXES) that are known before its prompts are tokenized."""
    batch, _, height, width = plan.latents_shape
    factor, scale = manifest.model.vae_scale_factor, manifest.model.decoder_tile_scale
    features = {"height": height * factor // scale, "width": width * factor // scale}
    window = plan.decoder_tile // scale + 2 * manifest.model.decoder_tile_halo
    tiles = {f"tile_{side}": min(window, length) for side, length in features.items()} if plan.decoder_tile else {}
    return {
        "batch": batch,
        "branches": len(plan.perturbed),
        "latent_height": height,
        "latent_width": width,
        "image_height": height * factor,
        "image_width": width * factor,
        **{f"feature_{side}": length for side, length in features.items()},
        **tiles,
        "output_height": plan.output_height,
        "output_width": plan.output_width,
    }


def choose_tile(requested: int | None, height: int, width: int) -> int:
    """The side in pixels of the tiles that an image of `height` x `width` is decoded in; 0 for one piece. None: the default."""
    if requested is not None:
        return requested
    return DECODER_TILE if height * width > UNTILED_AREA else 0


def checked_latents(latents: npt.ArrayLike, shape: tuple[int, ...]) -> Float32:
    """A float32 copy of latents from the caller. Raises UsageError for another shape or values that are not finite."""
    try:
        array = np.array(latents, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError("latents are not an array of numbers", found=error, wanted=f"float32 {shape}") from error
    if array.shape != shape:
        raise UsageError(
            "latents have the wrong shape for this request",
            found=array.shape,
            wanted=f"{shape} (images, channels, and the sampled height and width in latent pixels)",
        )
    if count := int(np.count_nonzero(~np.isfinite(array))):
        raise UsageError("latents must be finite", found=f"{count} of {array.size} values are NaN or infinite", wanted="numbers")
    return array


def _check_embedded_guidance(request: Request, negatives: Sequence[str]) -> None:
    """Raise UsageError for parameters that a checkpoint with distilled guidance does not have."""
    for name, given, found in (
        ("negative_prompt", any(negatives), request.negative_prompt),
        ("pag_scale", request.pag_scale != 0, request.pag_scale),
    ):
        if given:
            raise UsageError(
                f"this checkpoint accepts no {name}: its guidance is distilled into one branch (SANA-Sprint)",
                found=f"{name} {found!r}",
                wanted="only guidance_scale",
                fix=f"leave out {name} (--{name.replace('_', '-')})",
            )


def _guidance(scale: float, request: Request, schedule: Schedule, bundle: Path, manifest: Manifest) -> tuple[list[str], Float32]:
    """The guidance branches, and the weight [N, K] of each branch's prediction at each step.

    Guidance is uncond + g * (cond - uncond) + p * (cond - perturbed), which is linear in the predictions. Without classifier-free
    guidance g is 1. Source: diffusers `SanaPipeline.__call__` and `PAGMixin._apply_perturbed_attention_guidance`.
    """
    pag_scale = _number("pag_scale", request.pag_scale, minimum=0.0)
    adaptive = _number("pag_adaptive_scale", request.pag_adaptive_scale, minimum=0.0)
    if pag_scale > 0 and not manifest.options.pag_layers:
        raise UsageError(
            "this bundle has no layers for perturbed attention guidance",
            found=f"pag_scale {pag_scale:g}",
            wanted="pag_scale 0, or a bundle that was exported with --pag-layers",
            fix=export_command(bundle, manifest, pag_layers=(8,)),
        )
    guided = scale > 1
    branches = ["uncond"] * guided + ["cond"] + ["perturbed"] * (pag_scale > 0)
    # Without a PAG scale there is no perturbed branch, so the adaptive term does not apply either.
    p = np.maximum(pag_scale - adaptive * (_FIRST_TIMESTEP - schedule.timesteps.astype(np.float64)), 0) * (pag_scale > 0)
    g = scale if guided else 1.0
    weights = {"uncond": np.full_like(p, 1 - g), "cond": g + p, "perturbed": -p}
    return branches, np.stack([weights[branch] for branch in branches], axis=1).astype(np.float32)


def _checked_tile(decoder_tile: Any, scale: int) -> int | None:
    """The requested side of a tile in image pixels. `scale` pixels are one feature, which cannot be divided."""
    if decoder_tile is None:
        return None
    pixels = _integer("decoder_tile", decoder_tile, minimum=0)
    if pixels % scale:
        raise UsageError(
            "decoder_tile does not fit the decoder",
            found=f"{pixels} pixels",
            wanted=f"a multiple of {scale}, or 0 to decode in one piece",
            fix=f"--decoder-tile {max(scale, pixels // scale * scale)}",
        )
    return pixels


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} is not text", found=repr(value), wanted="a str, or a list of one or more str")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{name} is not Unicode text", found=repr(text), wanted="text without lone surrogates") from error
    return texts


def _negative_prompts(negative_prompt: Any, count: int) -> tuple[str, ...]:
    if negative_prompt is None:
        return ("",) * count
    negatives = _texts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        return negatives * count
    if len(negatives) != count:
        raise UsageError(
            "the number of negative prompts does not match the number of prompts",
            found=f"{len(negatives)} negative prompts for {count} prompts",
            wanted=f"one str for all, or a list of {count}",
        )
    return negatives


def _seeds(seed: Any, batch: int) -> tuple[int, ...]:
    if seed is None:
        return (secrets.randbelow(2**32),)
    many = isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, str)
    seeds = tuple(_integer("seed", value, minimum=None) for value in (seed if many else [seed]))
    if len(seeds) not in (1, batch):
        raise UsageError(
            "the number of seeds does not match the number of images",
            found=f"{len(seeds)} seeds for {batch} images",
            wanted="1 seed" if batch == 1 else f"1 seed, or {batch}",
        )
    for value in seeds:
        TorchGenerator(value)  # checks the range
    return seeds


def _integer(name: str, value: Any, minimum: int | None = 1) -> int:
    wanted = "an integer" if minimum is None else f"an integer, {minimum} or more"
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UsageError(f"{name} is not an integer", found=repr(value), wanted=wanted) from error
    if isinstance(value, bool) or (minimum is not None and number < minimum):
        raise UsageError(f"{name} is out of range", found=repr(value), wanted=wanted)
    return number


def _number(name: str, value: Any, minimum: float | None = None) -> float:
    wanted = "a finite number" + ("" if minimum is None else f", {minimum:g} or more")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} is not a number", found=repr(value), wanted=wanted) from error
    if not math.isfinite(number) or (minimum is not None and number < minimum):
        raise UsageError(f"{name} is out of range", found=repr(value), wanted=wanted)
    return number


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise UsageError(f"unknown {name} {value!r}", wanted=", ".join(choices))
    return str(value)


def _side(name: str, value: Any) -> int:
    """A side of the delivered image in pixels."""
    pixels = _integer(name, value)
    if pixels > MAX_SIDE:
        raise UsageError(f"{name} is out of range", found=f"{pixels} pixels", wanted=f"at most {MAX_SIDE} pixels")
    return pixels


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
