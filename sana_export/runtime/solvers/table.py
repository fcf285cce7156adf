"""What every solver returns: one row of coefficients for each step, and how a request chooses its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.contract import COEFFICIENTS, HISTORY
from sana_export.formats.arrays import Float32

#: The defaults of diffusers' SanaSprintPipeline: SANA-Sprint's first timestep, and the second of two.
SPRINT_MAX_TIMESTEP = 1.57080
SPRINT_INTERMEDIATE_TIMESTEP = 1.3
#: An angle of pi / 2 is pure noise. diffusers' default is a little above it.
SPRINT_MOST_TIMESTEP = 1.5709


@dataclass(frozen=True)
class SprintAngles:
    """Parameters of SanaSprintPipeline that choose its timesteps."""

    #: `max_timesteps`: the first timestep.
    first: float = SPRINT_MAX_TIMESTEP
    #: `intermediate_timesteps`: the second of two timesteps. None: evenly spaced timesteps.
    second: float | None = SPRINT_INTERMEDIATE_TIMESTEP


DEFAULT_ANGLES = SprintAngles()


@dataclass(frozen=True)
class Spacing:
    """The steps that a request asks for."""

    #: `num_inference_steps`, or the number of steps that `timesteps` or `sigmas` make.
    steps: int
    #: Custom timesteps, as diffusers' `set_timesteps` takes them.
    timesteps: tuple[float, ...] | None = None
    #: Custom sigmas, as diffusers' `set_timesteps` takes them.
    sigmas: tuple[float, ...] | None = None
    #: SANA-Sprint's own parameters.
    angles: SprintAngles = DEFAULT_ANGLES
    #: The step that sampling begins with, as diffusers' `set_begin_index`. Steps before it are not in the table.
    first: int = 0


@dataclass(frozen=True, eq=False)
class Schedule:
    """One sampling run of N steps."""

    #: float32 [N]: the denoiser's input at each step, before any `timestep_scale`.
    timesteps: Float32
    #: float32 [N, len(COEFFICIENTS)]: the sampler's input at each step; columns `contract.COEFFICIENTS`.
    coefficients: Float32
    #: Factor on the standard normal noise, or on the caller's latents, before the first step.
    initial_noise_scale: float
    #: Whether fresh noise is drawn at every step, after the initial noise and from the same generator, as in diffusers.
    needs_noise: bool
    #: float32 [N]: the latents after each step in diffusers are these factors times ours.
    latents_scale: Float32
    #: float32 [N + 1]: before step i the latents are (1 - sigmas[i]) * image + sigmas[i] * standard normal noise.
    sigmas: Float32


@dataclass(frozen=True, eq=False)
class Flow:
    """The whole schedule of a flow, before it is cut at `Spacing.first`."""

    #: float32 [N]: the denoiser's input.
    timesteps: Float32
    #: float32 [N + 1]: the noise level before each step and after the last one.
    sigmas: Float32


@dataclass(frozen=True, eq=False)
class Update:
    """The next latents of n steps as a linear function of what the sampler holds."""

    #: [n]: factor on the latents.
    latents: npt.ArrayLike
    #: [n, up to 1 + len(HISTORY)]: factors on this step's x0 and on those before, newest first.
    x0: npt.NDArray[Any]
    #: [n]: factor on the fresh noise.
    noise: npt.ArrayLike = 0


def coefficient_table(steps: int, **columns: npt.ArrayLike) -> Float32:
    """The coefficients [N, len(COEFFICIENTS)] from columns of N values or one value each. Other columns are 0."""
    table = np.zeros((steps, len(COEFFICIENTS)))
    for name, values in columns.items():
        table[:, COEFFICIENTS.index(name)] = values
    return table.astype(np.float32)


def flow_schedule(flow: Flow, first: int, update: Callable[[Float32], Update], *, noisy: bool = False) -> Schedule:
    """The schedule of a solver with x0 = latents - sigma * noise_pred, from step `first` on.

    `update` gets the n + 1 sigmas of the remaining n steps. `noisy`: diffusers draws noise at every step.
    """
    sigmas, timesteps = flow.sigmas[first:], flow.timesteps[first:]
    found = update(sigmas)
    past = dict(zip(("x0", *HISTORY), found.x0.T, strict=False))
    noise = np.broadcast_to(found.noise, timesteps.shape)
    coefficients = coefficient_table(
        len(timesteps), x0_latents=1, x0_noise_pred=-sigmas[:-1], latents=found.latents, noise=noise, **past
    )
    return Schedule(timesteps, coefficients, 1.0, noisy and bool(noise.any()), np.ones_like(timesteps), sigmas)


def rounded(function: Callable[[Any], Any], x: npt.ArrayLike) -> Any:
    """`function` of `x`, computed in float64 and rounded to float32: equal to torch's float32 result on any processor."""
    return np.asarray(function(np.asarray(x, dtype=np.float64))).astype(np.float32)


def log_snr(sigmas: Float32) -> tuple[Float32, Float32]:
    """alpha = 1 - sigma, and log(alpha / sigma), each [N + 1] and rounded as diffusers rounds them."""
    alphas = np.float32(1) - sigmas
    return alphas, rounded(np.log, alphas) - rounded(np.log, sigmas)


def last_of_few(step: int, steps: int, back: int) -> bool:
    """Whether `step` is the last one (`back` 1) or the one before (2) of a run that is too short for high orders.

    diffusers' `lower_order_final` is for fewer than 15 steps.
    """
    return step == steps - back and steps < 15


def combine(weights: Sequence[Any], vectors: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The sum of `vectors` times `weights`, in float64."""
    return np.asarray(sum(float(weight) * vector for weight, vector in zip(weights, vectors, strict=True)))
