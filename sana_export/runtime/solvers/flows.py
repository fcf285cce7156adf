"""The sigmas and timesteps of diffusers' schedulers for flow models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.runtime.solvers.table import Flow, Spacing

#: The exponent of Karras' sigmas (arXiv 2206.00364).
KARRAS_RHO = 7.0
#: diffusers' UniPC moves a first sigma of 1 down by this much: its alpha would be 0, and the logarithm infinite.
UNIPC_EPSILON = 1e-6

Sigmas = npt.NDArray[np.floating[Any]]


def shifted(sigmas: Any, shift: float) -> Any:
    """Sigmas moved towards 1 for large images (arXiv 2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dpm_flow(config: Mapping[str, Any], spacing: Spacing) -> Flow:
    """`set_timesteps` of DPMSolverMultistepScheduler and DPMSolverSinglestepScheduler."""
    train_steps = config["num_train_timesteps"]
    linear = 1.0 - np.linspace(1, 1 / train_steps, spacing.steps + 1)
    sigmas = np.flip(shifted(linear, config["flow_shift"]))[:-1]
    last = 0.0 if config["final_sigmas_type"] == "zero" else training_sigmas(config)[0]
    return Flow(_whole(sigmas * train_steps), np.append(sigmas, last).astype(np.float32))


def unipc_flow(config: Mapping[str, Any], spacing: Spacing) -> Flow:
    """`set_timesteps` of UniPCMultistepScheduler."""
    train_steps = config["num_train_timesteps"]
    if config["use_karras_sigmas"]:
        if spacing.sigmas is not None:
            raise UsageError(
                "UniPCMultistepScheduler takes no custom sigmas with use_karras_sigmas",
                found=f"sigmas of {len(spacing.sigmas)} numbers",
                wanted="num_inference_steps, or use_karras_sigmas False",
            )
        least, most = training_sigmas(config)
        least, most = (
            given if given is not None else ours for given, ours in ((config["sigma_min"], least), (config["sigma_max"], most))
        )
        sigmas = karras(most, least, spacing.steps)
        sigmas = sigmas / (sigmas + 1)
    else:
        given = np.linspace(1, 1 / train_steps, spacing.steps + 1)[:-1] if spacing.sigmas is None else np.array(spacing.sigmas)
        sigmas = stretched(shifted(given, config["flow_shift"]), config["shift_terminal"])
        if abs(sigmas[0] - 1) < UNIPC_EPSILON:
            sigmas[0] -= UNIPC_EPSILON
    last = 0.0 if config["final_sigmas_type"] == "zero" else sigmas[-1]
    return Flow(_whole(sigmas * train_steps), np.append(sigmas, last).astype(np.float32))


def euler_flow(config: Mapping[str, Any], spacing: Spacing) -> Flow:
    """`set_timesteps` of FlowMatchEulerDiscreteScheduler and FlowMatchLCMScheduler.

    As in diffusers, the shift is applied twice to the smallest sigma: to find the range, and to the sigmas spread over it. Custom
    timesteps are the denoiser's as they are, and custom sigmas are shifted.
    """
    train_steps, shift = config["num_train_timesteps"], config["shift"]
    if spacing.sigmas is not None:
        sigmas: Sigmas = np.array(spacing.sigmas, np.float32)
    elif spacing.timesteps is not None:
        sigmas = np.array(spacing.timesteps, np.float32) / np.float32(train_steps)
    else:
        sigmas = _evenly(train_steps, shift, spacing.steps)
    sigmas = stretched(shifted(sigmas, shift), config.get("shift_terminal"))
    if config.get("use_karras_sigmas"):
        sigmas = karras(sigmas[0].item(), sigmas[-1].item(), spacing.steps)
    elif config.get("use_exponential_sigmas"):
        sigmas = np.exp(np.linspace(np.log(sigmas[0].item()), np.log(sigmas[-1].item()), spacing.steps))
    exact = np.append(sigmas, 0).astype(np.float32)
    if spacing.timesteps is not None:
        return Flow(np.array(spacing.timesteps, np.float32), exact)
    return Flow(exact[:-1] * np.float32(train_steps), exact)


def heun_flow(config: Mapping[str, Any], spacing: Spacing) -> Flow:
    """`set_timesteps` of FlowMatchHeunDiscreteScheduler: the denoiser sees every sigma but the first twice, 2 N - 1 in all."""
    once = euler_flow({**config, "shift_terminal": None}, spacing)
    return Flow(np.repeat(once.timesteps, 2)[1:], np.append(np.repeat(once.sigmas[:-1], 2)[1:], np.float32(0)))


def stretched(sigmas: Sigmas, terminal: float | None) -> Sigmas:
    """Sigmas whose distances to 1 are scaled so that the last one is `terminal`. None or 0: as they are."""
    if not terminal:
        return sigmas
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))


def karras(most: float, least: float, steps: int) -> Sigmas:
    """Sigmas from `most` to `least` as in arXiv 2206.00364."""
    ends = most ** (1 / KARRAS_RHO), least ** (1 / KARRAS_RHO)
    ramp = np.linspace(0, 1, steps)
    return np.asarray((ends[0] + ramp * (ends[1] - ends[0])) ** KARRAS_RHO)


def training_sigmas(config: Mapping[str, Any]) -> tuple[float, float]:
    """The smallest and the largest sigma of a diffusion's `beta_schedule`, which also a flow's scheduler uses for some options."""
    start, end, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    betas = np.linspace(start ** (1 / power), end ** (1 / power), steps).astype(np.float32) ** power
    kept = (np.float32(1) - betas).astype(np.float64)
    ends = np.array([kept[0], np.prod(kept)]).astype(np.float32)
    least, most = np.sqrt((np.float32(1) - ends) / ends)
    return float(least), float(most)


def _evenly(train_steps: int, shift: float, steps: int) -> Sigmas:
    """Sigmas over the range that the scheduler's constructor shifts."""
    ends = np.array([train_steps, 1], dtype=np.float32) / np.float32(train_steps)
    ends = np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends)
    return np.asarray(np.linspace(float(ends[0]) * train_steps, float(ends[1]) * train_steps, steps) / train_steps)


def _whole(timesteps: Sigmas) -> Float32:
    """Timesteps truncated to whole numbers, as diffusers stores them."""
    return np.asarray(timesteps.astype(np.int64).astype(np.float32))
