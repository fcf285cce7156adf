"""What is asked for, and what follows from it for one checkpoint: sizes, seeds, guidance branches, the schedule.

Parameter names, defaults and meanings are those of diffusers' SanaPipeline and SanaPAGPipeline, for a checkpoint with
`guidance_embeds` those of SanaSprintPipeline.
"""

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

from sana_export.commands import export_line
from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Float32
from sana_export.manifest import Manifest
from sana_export.profiles import DECODER_TILE, UNTILED_AREA
from sana_export.resolutions import BINS
from sana_export.runtime.noise import TorchGenerator
from sana_export.runtime.resolution import ResizePlan, check_size, choose_bin, make_resize_plan
from sana_export.runtime.schedule import Schedule, make_schedule

#: Pixels: the longest side of Sana's largest resolution bin, twice. What runs is bounded by memory long before.
MAX_SIDE = 16384
OUTPUT_TYPES = ("pil", "np", "latent")
#: diffusers scales PAG by how far the timestep is from here.
_FIRST_TIMESTEP = 1000


@dataclass(frozen=True, eq=False)
class Request:
    """What the caller asks for. None means the default of the bundle's checkpoint.

    prompt, negative_prompt: one text or several; one negative prompt serves all prompts. The negative one is not used without
        guidance.
    guidance_scale: above 1 turns classifier-free guidance on. pag_scale: above 0 turns perturbed attention guidance on, in
        the layers that the bundle was exported with; pag_adaptive_scale lessens it at later steps. A SANA-Sprint checkpoint
        reads any guidance_scale itself, and takes neither a negative prompt nor PAG.
    height, width: pixels. With use_resolution_binning the image is sampled at the nearest size that the checkpoint was
        trained on, then resized and cropped; without, they must be multiples of the manifest's `vae_scale_factor` (32 for Sana).
        None: with it if the checkpoint has a table of such sizes. Those of other sample sizes than Sana's (`tiny`, of 128 px) do
        not.
    seed: one for all images, as one `torch.Generator("cpu").manual_seed(seed)`, or one for each image. None draws one.
    latents: float32 [images, channels, h, w] to start from instead of noise; h and w are the sampled size in latent pixels.
    complex_human_instruction: encode prompts after the checkpoint's instruction.
    max_sequence_length: tokens of a prompt that reach the denoiser; a longer prompt is truncated with a warning.
    output_type: "pil" (Pillow images), "np" (float32 [images, height, width, 3] in [0, 1], not rounded) or "latent".
    decoder_tile: side in image pixels of the tiles that the image is decoded in, to the same values in less memory; 0 decodes in
        one piece. None: in one piece up to 2048x2048 pixels of area, in tiles beyond.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    latents: npt.ArrayLike | None = None
    output_type: str = "pil"
    use_resolution_binning: bool | None = None
    complex_human_instruction: bool = True
    max_sequence_length: int | None = None
    decoder_tile: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked request. B images, K guidance branches, N steps.

    texts: the K branches' prompts with whether the instruction goes before them, one for each of the request's prompts.
    latents_shape: [B, C, h, w]. latents: what to start from, or None for noise. seeds: one, or one for each image.
    perturbed: float32 [K], 1 where the branch takes perturbed attention. guidance_weights: float32 [N, K], a row for each step.
    guidance: float32 [1], the guidance scale that the denoiser is fed, or None where it takes none.
    decoder_tile: side of a tile in image pixels, 0 for one piece. decoder_graphs: the graphs that decode.
    """

    texts: tuple[tuple[tuple[str, ...], bool], ...]
    images_per_prompt: int
    max_sequence_length: int
    latents_shape: tuple[int, int, int, int]
    latents: Float32 | None
    seeds: tuple[int, ...]
    schedule: Schedule
    perturbed: Float32
    guidance_weights: Float32
    guidance: Float32 | None
    resize: ResizePlan
    output_height: int
    output_width: int
    output_type: str
    decoder_tile: int

    @property
    def decoder_graphs(self) -> tuple[str, ...]:
        if self.output_type == "latent":
            return ()
        return ("vae_decoder_head", "vae_decoder_tail") if self.decoder_tile else ("vae_decoder",)


def bins_resolution(request: Request, sample_size: int) -> bool:
    """Whether the image is sampled at a size of the checkpoint's table; `sample_size` is that of its transformer config."""
    asked = request.use_resolution_binning
    return sample_size in BINS if asked is None else asked


def make_plan(request: Request, bundle: Path, manifest: Manifest) -> Plan:
    """The plan of `request` for the checkpoint of `manifest`. Raises UsageError, listing what is possible."""
    model = manifest.model
    prompts = _prompts(request.prompt)
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
            wanted="a bundle that holds them, or decoder_tile 0 (--decoder-tile 0), which decodes in one piece",
            fix=export_line(bundle, manifest),
        )
    return plan


def choose_tile(asked: int | None, height: int, width: int) -> int:
    """The side of a decoder tile in image pixels for an image of `height` x `width`: 0 is one piece, `asked` None the default."""
    if asked is not None:
        return asked
    return DECODER_TILE if height * width > UNTILED_AREA else 0


def checked_latents(latents: npt.ArrayLike, shape: tuple[int, ...]) -> Float32:
    """A float32 copy of latents that a caller gives. Raises UsageError for another shape or values that are not finite."""
    try:
        array = np.array(latents, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError("latents are no array of numbers", found=error, wanted=f"float32 {shape}") from error
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
    """Raise UsageError for what a checkpoint cannot do whose one branch holds all guidance."""
    for name, asked, found in (
        ("negative_prompt", any(negatives), request.negative_prompt),
        ("pag_scale", request.pag_scale != 0, request.pag_scale),
    ):
        if asked:
            raise UsageError(
                f"this checkpoint takes no {name}: its guidance is distilled into one run a step (SANA-Sprint)",
                found=f"{name} {found!r}",
                wanted="guidance_scale alone",
                fix=f"leave out {name} (--{name.replace('_', '-')})",
            )


def _guidance(scale: float, request: Request, schedule: Schedule, bundle: Path, manifest: Manifest) -> tuple[list[str], Float32]:
    """The guidance branches, and the weight [N, K] of each one's prediction at each step.

    Guidance is uncond + g * (cond - uncond) + p * (cond - perturbed), which is linear in the predictions; g = 1 without
    classifier-free guidance. Source: diffusers `SanaPipeline.__call__` and `PAGMixin._apply_perturbed_attention_guidance`.
    """
    pag_scale = _number("pag_scale", request.pag_scale, minimum=0.0)
    adaptive = _number("pag_adaptive_scale", request.pag_adaptive_scale, minimum=0.0)
    if pag_scale > 0 and not manifest.options.pag_layers:
        raise UsageError(
            "this bundle has no layers for perturbed attention guidance",
            found=f"pag_scale {pag_scale:g}",
            wanted="pag_scale 0, or a bundle that was exported with --pag-layers",
            fix=export_line(bundle, manifest, pag_layers=(8,)),
        )
    guided = scale > 1
    branches = ["uncond"] * guided + ["cond"] + ["perturbed"] * (pag_scale > 0)
    # A PAG scale of 0 leaves the adaptive term out too: there is no perturbed branch then.
    p = np.maximum(pag_scale - adaptive * (_FIRST_TIMESTEP - schedule.timesteps.astype(np.float64)), 0) * (pag_scale > 0)
    g = scale if guided else 1.0
    weights = {"uncond": np.full_like(p, 1 - g), "cond": g + p, "perturbed": -p}
    return branches, np.stack([weights[branch] for branch in branches], axis=1).astype(np.float32)


def _checked_tile(decoder_tile: Any, scale: int) -> int | None:
    """The side of a tile in image pixels; `scale` of them are one feature, which is not divided."""
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


def _prompts(prompt: Any) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, Sequence) else ()
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise UsageError("the prompt is not a text", found=repr(prompt), wanted="a str, or a list of one or more str")
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is not Unicode text", found=repr(text), wanted="UTF-8") from error
    return prompts


def _negative_prompts(negative_prompt: Any, count: int) -> tuple[str, ...]:
    if negative_prompt is None:
        return ("",) * count
    negatives = _prompts(negative_prompt)
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
        raise UsageError(f"there is no {name} {value!r}", wanted=", ".join(choices))
    return str(value)


def _side(name: str, value: Any) -> int:
    """A side of the image in pixels."""
    pixels = _integer(name, value)
    if pixels > MAX_SIDE:
        raise UsageError(f"{name} is out of range", found=f"{pixels} pixels", wanted=f"at most {MAX_SIDE} pixels")
    return pixels


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def request_axes(plan: Plan, manifest: Manifest) -> dict[str, int]:
    """The axes of the plan's tensors (contract.DYNAMIC_AXES) that are known before its prompts are read."""
    batch, _, height, width = plan.latents_shape
    factor, scale = manifest.model.vae_scale_factor, manifest.model.decoder_tile_scale
    return {
        "batch": batch,
        "branches": len(plan.perturbed),
        "latent_height": height,
        "latent_width": width,
        "image_height": height * factor,
        "image_width": width * factor,
        "feature_height": height * factor // scale,
        "feature_width": width * factor // scale,
        "output_height": plan.output_height,
        "output_width": plan.output_width,
    }
