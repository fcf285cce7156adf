"""Sampling schedules as tables. Every solver that Sana uses is linear in its inputs, so a row of six numbers describes a step.

A step computes, with the columns of its row named as in `contract.COEFFICIENTS`,

    x0           = x0_latents * latents + x0_noise_pred * noise_pred
    next_latents = latents * latents + x0 * x0 + previous_x0 * previous_x0 + noise * noise

where `previous_x0` is the x0 of the step before (at the first step zeros, and its column is 0) and `noise` is fresh standard normal
noise (any finite value if its column is 0). After the last step latents and x0 are equal.

The rows are equivalent to `step` of diffusers' scheduler of the same name. Sigmas, their logarithms and exponentials are rounded to
float32 if diffusers computes them in float32; everything else is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.architectures import SCHEDULER_DEFAULTS
from sana_export.contract import COEFFICIENTS
from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.supported import SCHEDULERS, unsupported

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


@dataclass(frozen=True, eq=False)
class Schedule:
    """One sampling run of N steps."""

    #: float32 [N]: the denoiser's input at each step, before any `timestep_scale`.
    timesteps: Float32
    #: float32 [N, 6]: the sampler's input at each step; columns `contract.COEFFICIENTS`.
    coefficients: Float32
    #: Factor on the standard normal noise, or on the caller's latents, before the first step.
    initial_noise_scale: float
    #: Whether fresh noise is drawn at every step, after the initial noise and from the same generator, as in diffusers.
    needs_noise: bool
    #: float32 [N]: the latents after each step in diffusers are these factors times ours.
    latents_scale: Float32


@dataclass(frozen=True)
class _Solver:
    """One of diffusers' schedulers."""

    #: From the complete config, the number of steps, and the angles, which all but SANA-Sprint's ignore.
    build: Callable[[Mapping[str, Any], int, SprintAngles], Schedule]
    #: Whether it has the angles.
    angular: bool = False


def make_schedule(config: Mapping[str, Any], num_inference_steps: int, angles: SprintAngles = DEFAULT_ANGLES) -> Schedule:
    """The schedule of `num_inference_steps` steps for the scheduler config of a bundle's manifest.

    Raises UsageError for fewer than 1 step, a scheduler that is not in `SCHEDULERS`, a setting that the table cannot express, and
    `angles` for another checkpoint than SANA-Sprint. An export refuses such a checkpoint, but older exports did not.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise UsageError(
            "this checkpoint's scheduler is not supported",
            found=f"_class_name {name!r}",
            wanted=" or ".join(SCHEDULERS),
        )
    full = SCHEDULER_DEFAULTS[name] | dict(config)  # older bundles have what the checkpoint's file says, which may lack keys
    for setting in unsupported(name, full, config):
        raise UsageError(
            f"this setting of the checkpoint's {name} is not supported",
            found=f"{setting.key} = {setting.found}",
            wanted=f"{setting.key} = {setting.wanted}",
        )
    if num_inference_steps < 1:
        raise UsageError("sampling needs at least one step", found=num_inference_steps, wanted="1 or more")
    solver = _SOLVERS[name]
    if angles != DEFAULT_ANGLES and not solver.angular:
        raise UsageError(
            "this checkpoint has no max_timesteps and intermediate_timesteps: they belong to SANA-Sprint",
            found=f"max_timesteps {angles.first:g}, intermediate_timesteps {angles.second}",
            wanted="num_inference_steps alone",
        )
    return solver.build(full, int(num_inference_steps), angles)


def _table(num_inference_steps: int, **columns: npt.ArrayLike) -> Float32:
    """The coefficients [N, 6] from columns of N values or one value each. Other columns are 0."""
    table = np.zeros((num_inference_steps, len(COEFFICIENTS)))
    for name, values in columns.items():
        table[:, COEFFICIENTS.index(name)] = values
    return table.astype(np.float32)


def _rounded(function: Callable[[Any], Any], x: Float32) -> Float32:
    """`function` of `x`, computed in float64 and rounded to float32: equal to torch's float32 result on any processor."""
    return np.asarray(function(x.astype(np.float64))).astype(np.float32)


def _dpm_solver(config: Mapping[str, Any], num_inference_steps: int, _: SprintAngles) -> Schedule:
    """DPM-Solver++ of order 1 or 2 (midpoint) over flow sigmas, ending at sigma 0: diffusers' DPMSolverMultistepScheduler.

    `lower_order_final` and `euler_at_final` have no effect: a last step to sigma 0 is always of order 1.

    diffusers finds its starting point by value. If the first two timesteps are equal, it starts at the second and runs out of
    sigmas at the last step (IndexError). This happens from 501 steps at shift 3 and from 201 at shift 6. The schedule of this
    function always starts at the first sigma.
    """
    train_steps, shift = config["num_train_timesteps"], config["flow_shift"]
    linear = 1.0 - np.linspace(1, 1 / train_steps, num_inference_steps + 1)
    shifted = np.flip(shift * linear / (1 + (shift - 1) * linear))[:-1]
    sigmas = np.append(shifted, 0).astype(np.float32)
    alphas = np.float32(1) - sigmas
    with np.errstate(divide="ignore"):  # the logarithm of the last sigma, 0
        log_snr = _rounded(np.log, alphas) - _rounded(np.log, sigmas)
    h = np.diff(log_snr)
    decay = alphas[1:] * (_rounded(np.exp, -h) - np.float32(1))
    gain = np.zeros(num_inference_steps)
    if config["solver_order"] == 2:  # all steps but the first and the last
        gain[1:-1] = 0.5 * decay[1:-1] * (h[1:-1] / h[:-2])
    coefficients = _table(
        num_inference_steps,
        x0_latents=1,
        x0_noise_pred=-sigmas[:-1],
        latents=sigmas[1:] / sigmas[:-1],
        x0=-(decay + gain),
        previous_x0=gain,
    )
    timesteps = (shifted * train_steps).astype(np.int64).astype(np.float32)
    return Schedule(timesteps, coefficients, 1.0, False, np.ones_like(timesteps))


def _flow_euler(config: Mapping[str, Any], num_inference_steps: int, _: SprintAngles) -> Schedule:
    """Euler steps of the flow; with `stochastic_sampling`, fresh noise on x0: diffusers' FlowMatchEulerDiscreteScheduler.

    As in diffusers, the shift is applied twice to the smallest sigma: to find the range, and to the sigmas spread over it.
    """
    train_steps, shift = config["num_train_timesteps"], config["shift"]
    ends = np.array([train_steps, 1], dtype=np.float32) / np.float32(train_steps)
    ends = np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends)
    linear = np.linspace(float(ends[0]) * train_steps, float(ends[1]) * train_steps, num_inference_steps) / train_steps
    sigmas = np.append(shift * linear / (1 + (shift - 1) * linear), 0).astype(np.float32)
    now, after = sigmas[:-1].astype(np.float64), sigmas[1:].astype(np.float64)
    if config["stochastic_sampling"]:
        columns = {"x0": 1 - after, "noise": after}
    else:
        columns = {"latents": after / now, "x0": 1 - after / now}
    coefficients = _table(num_inference_steps, x0_latents=1, x0_noise_pred=-now, **columns)
    timesteps, noisy = sigmas[:-1] * np.float32(train_steps), bool(coefficients[:, COEFFICIENTS.index("noise")].any())
    return Schedule(timesteps, coefficients, 1.0, noisy, np.ones_like(timesteps))


def _sprint_timesteps(num_inference_steps: int, angles: SprintAngles) -> Float32:
    """The angles t [N + 1] of SanaSprintPipeline, from the first one down to 0."""
    if num_inference_steps == 2 and angles.second is not None:
        return np.array([angles.first, angles.second, 0], dtype=np.float32)
    if angles.second not in (None, DEFAULT_ANGLES.second):
        raise UsageError(
            "intermediate_timesteps is the second of two timesteps",
            found=f"intermediate_timesteps {angles.second:g} and {num_inference_steps} steps",
            wanted="2 steps, or intermediate_timesteps None",
        )
    return np.linspace(angles.first, 0, num_inference_steps + 1).astype(np.float32)


def _sprint(config: Mapping[str, Any], num_inference_steps: int, given: SprintAngles) -> Schedule:
    """SANA-Sprint: diffusers' SCMScheduler (trigflow) and what SanaSprintPipeline computes around it.

    With sd = sigma_data, angle t, s = sin t / (cos t + sin t) and n = sqrt(s^2 + (1 - s)^2), the pipeline feeds the denoiser
    z = n * x / sd and s, and computes v = sd * ((1 - 2s) * z + (1 - 2s + 2s^2) * noise_pred) / n from its output. The scheduler
    computes pred_x0 = cos t * x - sin t * v and the next x = cos t' * pred_x0 + sin t' * sd * noise. The pipeline decodes
    pred_x0 / sd of the last step. All of this is linear, and sd cancels in these variables of the table:

        latents = z (the first: n * standard normal noise), x0 = pred_x0 / sd, timesteps = s, latents_scale = sd / n

    diffusers accepts only 2 steps unless the intermediate timestep is None; this function uses None for every other number of
    steps. The timesteps are equal to diffusers' for 1 and 2 steps, and equal up to float32 rounding (2.5e-7) for more.
    """
    train_steps = config["num_train_timesteps"]
    if num_inference_steps > train_steps:
        raise UsageError(
            "SCMScheduler cannot have more steps than it was trained with",
            found=f"{num_inference_steps} steps",
            wanted=f"1 to {train_steps}",
        )
    angles = _sprint_timesteps(num_inference_steps, given)
    sine, cosine = _rounded(np.sin, angles), _rounded(np.cos, angles)
    timesteps = sine / (cosine + sine)
    sin, cos, s = (values.astype(np.float64) for values in (sine, cosine, timesteps))
    n = np.sqrt(s**2 + (1 - s) ** 2)
    coefficients = _table(
        num_inference_steps,
        x0_latents=((cos - sin * (1 - 2 * s)) / n)[:-1],
        x0_noise_pred=(-sin * (1 - 2 * s + 2 * s**2) / n)[:-1],
        x0=(n * cos)[1:],
        noise=(n * sin)[1:],
    )
    scale = (config["sigma_data"] / n[1:]).astype(np.float32)
    return Schedule(timesteps[:-1], coefficients, float(n[0]), num_inference_steps > 1, scale)


_SOLVERS: Mapping[str, _Solver] = {
    "DPMSolverMultistepScheduler": _Solver(_dpm_solver),
    "FlowMatchEulerDiscreteScheduler": _Solver(_flow_euler),
    "SCMScheduler": _Solver(_sprint, angular=True),
}
