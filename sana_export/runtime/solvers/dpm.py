"""DPM-Solver++ over flow sigmas: diffusers' DPMSolverMultistepScheduler and DPMSolverSinglestepScheduler.

Source of the mathematics: arXiv 2211.01095, in the form of diffusers' code. Expressions that diffusers computes in float32 are
computed in float32 here, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Float32
from sana_export.runtime.solvers.flows import dpm_flow
from sana_export.runtime.solvers.table import Schedule, Spacing, Update, combine, flow_schedule, last_of_few, log_snr, rounded

#: The longest x0 history of this family, with the current one.
WIDTH = 3


@dataclass(frozen=True, eq=False)
class _Factors:
    """Factors of one integral from sigma s to sigma t, for every pair of them: float32 [n]."""

    #: On the latents.
    latents: Float32
    #: On D0, D1 and D2, the solver's estimates of x0 and its first two derivatives.
    d0: Float32
    d1: Float32
    d2: Float32
    #: On D1 in the form "midpoint".
    half: Float32
    #: On the fresh noise.
    noise: Float32


def _factors(h: Float32, ratio: Float32, alpha: Float32, sigma: Float32, *, stochastic: bool) -> _Factors:
    """`h` is the step in log SNR, `ratio` sigma_t / sigma_s; `alpha` and `sigma` are those of t."""
    one, two, half = np.float32(1), np.float32(2), np.float32(0.5)
    if stochastic:
        gone = one - rounded(np.exp, -two * h)
        return _Factors(
            latents=ratio * rounded(np.exp, -h),
            d0=alpha * gone,
            d1=alpha * (gone / (-two * h) + one),
            d2=alpha * ((gone - two * h) / (two * h) ** 2 - half),
            half=half * (alpha * gone),
            noise=sigma * np.sqrt(gone),
        )
    gone = rounded(np.exp, -h) - one
    return _Factors(
        latents=ratio,
        d0=-(alpha * gone),
        d1=alpha * (gone / h + one),
        d2=-(alpha * ((gone + h) / h**2 - half)),
        half=-(half * (alpha * gone)),
        noise=np.zeros_like(h),
    )


def dpm_multistep(config: Mapping[str, Any], spacing: Spacing) -> Schedule:
    """Orders 1 to 3, "midpoint" and "heun", deterministic or with fresh noise.

    diffusers finds its starting point by value. If the first two timesteps are equal, it starts at the second and runs out of
    sigmas at the last step (IndexError). This happens from 501 steps at shift 3 and from 201 at shift 6. The schedule of this
    function always starts at the first sigma.
    """
    stochastic = config["algorithm_type"] == "sde-dpmsolver++"

    def update(sigmas: Float32) -> Update:
        alphas, log = log_snr(sigmas)
        h = np.diff(log)
        by = _factors(h, sigmas[1:] / sigmas[:-1], alphas[1:], sigmas[1:], stochastic=stochastic)
        x0 = np.zeros((len(h), WIDTH))
        for row in range(len(h)):
            order = _multistep_order(config, row, row + spacing.first, spacing.steps)
            x0[row] = _multistep_row(by, h, row, order, config["solver_type"])
        return Update(by.latents, x0, by.noise)

    return flow_schedule(dpm_flow(config, spacing), spacing.first, update, noisy=stochastic)


def _multistep_order(config: Mapping[str, Any], row: int, step: int, steps: int) -> int:
    """The order of a step: 1 at the first `row` of a run, and lowered at its end as diffusers lowers it."""
    wanted = min(config["solver_order"], row + 1)
    lowered = config["lower_order_final"]
    if step == steps - 1 and (config["euler_at_final"] or config["final_sigmas_type"] == "zero"):
        return 1
    if lowered and last_of_few(step, steps, 1):
        return 1
    return min(wanted, 2) if lowered and last_of_few(step, steps, 2) else wanted


def _multistep_row(by: _Factors, h: Float32, row: int, order: int, solver_type: str) -> npt.NDArray[np.float64]:
    """Factors on the x0 of this step and of the two before it."""
    if order == 1:
        return np.array([by.d0[row], 0, 0])
    r0 = h[row - 1] / h[row]
    first = np.array([1, -1, 0]) / float(r0)
    if order == 2:
        return combine([by.d0[row], (by.half if solver_type == "midpoint" else by.d1)[row]], [np.eye(WIDTH)[0], first])
    r1 = h[row - 2] / h[row]
    second = np.array([0, 1, -1]) / float(r1)
    slope = first + float(r0 / (r0 + r1)) * (first - second)
    bend = (first - second) / float(r0 + r1)
    return combine([by.d0[row], by.d1[row], by.d2[row]], [np.eye(WIDTH)[0], slope, bend])


def dpm_singlestep(config: Mapping[str, Any], spacing: Spacing) -> Schedule:
    """Groups of steps of rising order. Every step of a group starts from the latents of the group's first step.

    Those latents are not kept: the last step made the current ones from them, and that is undone.
    """
    orders = _singlestep_orders(config, spacing.steps)

    def update(sigmas: Float32) -> Update:
        alphas, log = log_snr(sigmas)
        latents, x0 = np.zeros(len(log) - 1), np.zeros((len(log) - 1, WIDTH))
        for row in range(len(log) - 1):
            order = min(orders[row + spacing.first], row + 1)
            start = row + 1 - order
            latents[row], x0[row] = _singlestep_row(alphas, sigmas, log, row, order, config["solver_type"])
            if order > 1:  # latents = keep * base + past @ x0, solved for the base
                keep, past = _singlestep_row(alphas, sigmas, log, row - 1, row - start, config["solver_type"])
                x0[row, 1:] -= latents[row] / keep * past[:-1]
                latents[row] /= keep
        return Update(latents, x0)

    return flow_schedule(dpm_flow(config, spacing), spacing.first, update)


def _singlestep_orders(config: Mapping[str, Any], steps: int) -> list[int]:
    """`get_order_list`, with what `set_timesteps` changes before it: the order of each step."""
    most, zero = config["solver_order"], config["final_sigmas_type"] == "zero"
    lowered = config["lower_order_final"] or steps % most != 0 or zero
    orders = [1 + step % most for step in range(steps)]
    if zero or (lowered and steps % most == 0):
        orders[-1] = 1
    return orders


def _singlestep_row(
    alphas: Float32, sigmas: Float32, log: Float32, row: int, order: int, solver_type: str
) -> tuple[float, npt.NDArray[np.float64]]:
    """The factor on the latents of the step `order` - 1 before `row`, and the factors on the x0 of this step and the two before."""
    start = row + 1 - order
    h = log[row + 1] - log[start]
    by = _factors(h, sigmas[row + 1] / sigmas[start], alphas[row + 1], sigmas[row + 1], stochastic=False)
    unit = np.eye(WIDTH)
    if order == 1:
        return float(by.latents), float(by.d0) * unit[0]
    r0 = (log[row] - log[start]) / h
    newest = (unit[0] - unit[order - 1]) / float(r0)
    if order == 2:
        weights = [by.d0, by.half if solver_type == "midpoint" else by.d1]
        return float(by.latents), combine(weights, [unit[1], newest])
    if solver_type == "midpoint":
        return float(by.latents), combine([by.d0, by.d1], [unit[2], newest])
    r1 = (log[row - 1] - log[start]) / h
    older = (unit[1] - unit[2]) / float(r1)
    slope = (float(r0) * older - float(r1) * newest) / float(r0 - r1)
    bend = 2.0 * (newest - older) / float(r0 - r1)
    return float(by.latents), combine([by.d0, by.d1, by.d2], [unit[2], slope, bend])
