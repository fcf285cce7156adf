"""SANA-Sprint: diffusers' SCMScheduler (trigflow) and what SanaSprintPipeline computes around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.runtime.solvers.table import DEFAULT_ANGLES, Schedule, Spacing, SprintAngles, coefficient_table, rounded


def sprint(config: Mapping[str, Any], spacing: Spacing) -> Schedule:
    """The steps of SANA-Sprint in the variables of the denoiser.

    With sd = sigma_data, angle t, s = sin t / (cos t + sin t) and n = sqrt(s^2 + (1 - s)^2), the pipeline feeds the denoiser
    z = n * x / sd and s, and computes v = sd * ((1 - 2s) * z + (1 - 2s + 2s^2) * noise_pred) / n from its output. The scheduler
    computes pred_x0 = cos t * x - sin t * v and the next x = cos t' * pred_x0 + sin t' * sd * noise. The pipeline decodes
    pred_x0 / sd of the last step. All of this is linear, and sd cancels in these variables of the table:

        latents = z (the first: n * standard normal noise), x0 = pred_x0 / sd, timesteps = s, latents_scale = sd / n

    As n cos t = 1 - s and n sin t = s, the latents are those of a flow with sigma = s.

    diffusers accepts only 2 steps unless the intermediate timestep is None; this function uses None for every other number of
    steps. The timesteps are equal to diffusers' for 1 and 2 steps, and equal up to float32 rounding (2.5e-7) for more.
    """
    train_steps, first = config["num_train_timesteps"], spacing.first
    if spacing.steps > train_steps:
        raise UsageError(
            "SCMScheduler cannot have more steps than it was trained with",
            found=f"{spacing.steps} steps",
            wanted=f"1 to {train_steps}",
        )
    angles = _angles(spacing.steps, spacing.angles) if spacing.timesteps is None else np.array(spacing.timesteps, np.float32)
    sine, cosine = rounded(np.sin, angles), rounded(np.cos, angles)
    timesteps = sine / (cosine + sine)
    sin, cos, s = (values.astype(np.float64) for values in (sine, cosine, timesteps))
    n = np.sqrt(s**2 + (1 - s) ** 2)
    coefficients = coefficient_table(
        spacing.steps,
        x0_latents=((cos - sin * (1 - 2 * s)) / n)[:-1],
        x0_noise_pred=(-sin * (1 - 2 * s + 2 * s**2) / n)[:-1],
        x0=(n * cos)[1:],
        noise=(n * sin)[1:],
    )
    scale = (config["sigma_data"] / n[1:]).astype(np.float32)
    noisy = spacing.steps - first > 1
    return Schedule(timesteps[first:-1], coefficients[first:], float(n[first]), noisy, scale[first:], timesteps[first:])


def _angles(steps: int, given: SprintAngles) -> Float32:
    """The angles t [N + 1] of SanaSprintPipeline, from the first one down to 0."""
    if steps == 2 and given.second is not None:
        return np.array([given.first, given.second, 0], dtype=np.float32)
    if given.second not in (None, DEFAULT_ANGLES.second):
        raise UsageError(
            "intermediate_timesteps is the second of two timesteps",
            found=f"intermediate_timesteps {given.second:g} and {steps} steps",
            wanted="2 steps, or intermediate_timesteps None",
        )
    return np.linspace(given.first, 0, steps + 1).astype(np.float32)
