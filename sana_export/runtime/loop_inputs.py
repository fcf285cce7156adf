"""The inputs of the sampling loop, made from a plan and its conditioning."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Array, Float32
from sana_export.runtime.backends.base import Backend, DeviceTensor
from sana_export.runtime.control import residuals_shape
from sana_export.runtime.guidance import Branches
from sana_export.runtime.image_start import ImageStart
from sana_export.runtime.noise import TorchGenerator, randn_batch
from sana_export.runtime.plan import Plan
from sana_export.runtime.results import Conditioning


@dataclass(frozen=True, eq=False)
class LoopInputs:
    """The inputs of one run."""

    #: float32 [B, C, h, w], scaled as the schedule requires.
    latents: Float32
    #: The fresh noise of each step, float32 [B, C, h, w].
    noise: Iterator[Float32]
    #: float32 [N], scaled for the denoiser.
    timesteps: Float32
    #: float32 [N, len(COEFFICIENTS)], with the columns contract.COEFFICIENTS.
    coefficients: Float32
    #: By the branches of a step: float32 [N, K], of which the rows of the steps with these branches count.
    guidance_weights: Mapping[Branches, Float32]
    #: By the branches of a step: the denoiser's inputs that are the same in every such step, by name.
    fixed: Mapping[Branches, Mapping[str, DeviceTensor]]
    #: What the mask puts back after each step. None without a mask.
    blending: Blending | None = None
    #: By the branches of a step: the ControlNet's inputs that are the same in every such step, by name. None without a control
    #: image.
    control: Mapping[Branches, Mapping[str, DeviceTensor]] | None = None


@dataclass(frozen=True, eq=False)
class Blending:
    """The inputs of the graph `blend` (contract.py)."""

    #: image_latents, noise and mask, by name.
    fixed: Mapping[str, DeviceTensor | Array]
    #: float32 [N]: the noise level after each step.
    noise_levels: Float32


def check_conditioning(plan: Plan, conditioning: Conditioning) -> None:
    """Raise UsageError unless `conditioning` has the branches and the number of images of `plan`."""
    texts = len(plan.branches.texts)
    switching = any(len(part.branches.texts) < texts for part in plan.segments)
    wanted, found = (texts, plan.latents_shape[0], switching), (*conditioning.shape[:2], conditioning.unguided is not None)
    if found[:2] != wanted[:2] or found[2] < wanted[2]:
        described = [
            "{} guidance branches of {} images".format(*counts) + ", in an interval" * interval
            for *counts, interval in (found, wanted)
        ]
        raise UsageError(
            "the conditioning belongs to another plan",
            found=described[0],
            wanted=described[1],
            fix="runtime.steps(plan, runtime.encode(plan))",
        )
    image = None if conditioning.image_latents is None else conditioning.image_latents.shape
    control = None if conditioning.control is None else conditioning.control.shape
    _check_latents("image", None if plan.image is None else plan.latents_shape, image)
    _check_latents("control image", None if plan.control is None else plan.latents_shape, control)


def _check_latents(name: str, wanted: tuple[int, ...] | None, shape: tuple[int, ...] | None) -> None:
    """Raise UsageError unless the encoded images are there if the plan has some, and have the shape `wanted`."""
    if shape != wanted:
        raise UsageError(
            "the conditioning belongs to another plan",
            found=f"no encoded {name}" if shape is None else f"an encoded {name} of shape {list(shape)}",
            wanted=f"no encoded {name}" if wanted is None else f"an encoded {name} of shape {list(wanted)}",
            fix="runtime.steps(plan, runtime.encode(plan))",
        )


def loop_inputs(plan: Plan, conditioning: Conditioning, backend: Backend, timestep_scale: float) -> LoopInputs:
    """The inputs that sample `plan`. Every call draws the same noise, in torch's order."""
    generators = [TorchGenerator(seed) for seed in plan.seeds]
    from_seeds = partial(randn_batch, plan.latents_shape, generators)
    start = from_seeds() if plan.latents is None else plan.latents
    sets = {part.branches for part in plan.segments}
    latents = start * np.float32(plan.schedule.initial_noise_scale)
    blending = None
    if plan.image is not None and conditioning.image_latents is not None:
        latents = plan.image.noised(conditioning.image_latents, start)
        blending = _blending(plan.image, conditioning.image_latents, start, backend)
    return LoopInputs(
        latents=latents,
        noise=((plan.draw_noise or from_seeds)() for _ in plan.schedule.timesteps),
        timesteps=plan.schedule.timesteps * np.float32(timestep_scale),
        coefficients=plan.schedule.coefficients,
        guidance_weights={
            branches: plan.guidance_weights[:, [plan.branches.names.index(name) for name in branches.names]] for branches in sets
        },
        fixed={branches: _fixed_inputs(plan, conditioning, backend, branches) for branches in sets},
        blending=blending,
        control=_control_inputs(plan, conditioning, backend, sets),
    )


def _blending(image: ImageStart, image_latents: Float32, noise: Float32, backend: Backend) -> Blending | None:
    if image.mask is None:
        return None
    fixed = {"image_latents": image_latents, "noise": noise, "mask": image.mask}
    return Blending({name: backend.to_device(value) for name, value in fixed.items()}, image.noise_levels[1:])


def _fixed_inputs(plan: Plan, conditioning: Conditioning, backend: Backend, branches: Branches) -> dict[str, DeviceTensor]:
    """The denoiser's inputs that are the same in every step with these branches, by name."""
    context, mask = conditioning.of(branches)
    fixed = {"context": context, "context_mask": mask, "perturbed": backend.to_device(branches.perturbed)}
    if backend.manifest.options.pag_layers:
        fixed["source"] = backend.to_device(branches.source)
    if plan.guidance is not None:
        fixed["guidance"] = backend.to_device(plan.guidance)
    shape = residuals_shape(backend.manifest, plan.latents_shape, branches)
    if shape is not None and plan.control is None:
        fixed["residuals"] = backend.zeros(shape, backend.manifest.options.dtype)
    return fixed


def _control_inputs(
    plan: Plan, conditioning: Conditioning, backend: Backend, sets: Collection[Branches]
) -> dict[Branches, dict[str, DeviceTensor]] | None:
    if plan.control is None or conditioning.control is None:
        return None
    control, texts = conditioning.control, len(plan.branches.texts)
    shared = {"control": control.latents, "conditioning_scale": backend.to_device(plan.control.scale)}
    return {
        branches: {**shared, "context": control.of(branches, texts), "context_mask": conditioning.of(branches)[1]}
        for branches in sets
    }
