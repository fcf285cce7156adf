"""UniPC over flow sigmas: diffusers' UniPCMultistepScheduler (arXiv 2302.04867), as a multistep method without a corrector.

The denoiser sees the predicted latents y. The corrected latents c are never an input of anything but the next prediction:

    y' = e * c + predictor @ x0        (from the x0 of the steps before)
    c' = e * c + corrector @ x0        (once y' has been denoised)

With the same e in both, c' = y' + (corrector - predictor) @ x0. So the step after it needs y', this x0 and up to three older ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.contract import HISTORY
from sana_export.formats.arrays import Float32
from sana_export.runtime.solvers.flows import unipc_flow
from sana_export.runtime.solvers.table import Schedule, Spacing, Update, flow_schedule, log_snr, rounded

WIDTH = 1 + len(HISTORY)


def unipc(config: Mapping[str, Any], spacing: Spacing) -> Schedule:
    """Orders 1 to 3, "bh1" and "bh2", with the corrector left out at the steps of `disable_corrector`."""
    disabled = set(config["disable_corrector"] or ())

    def update(sigmas: Float32) -> Update:
        alphas, log = log_snr(sigmas)
        ratio = (sigmas[1:] / sigmas[:-1]).astype(np.float64)
        x0 = np.zeros((len(ratio), WIDTH))
        order, before = 1, np.zeros(WIDTH)  # the last step's predictor, on the x0 that were there before it
        for row in range(len(ratio)):
            step = row + spacing.first
            if row and step - 1 not in disabled:
                older = np.append(0, before[:-1])
                x0[row] = ratio[row] * (_corrector(alphas, log, row - 1, order, config["solver_type"]) - older)
            order = min(config["solver_order"], row + 1)
            if config["lower_order_final"]:
                order = min(order, spacing.steps - step)
            before = _predictor(alphas, log, row, order, config["solver_type"])
            x0[row] += before
        return Update(ratio, x0)

    return flow_schedule(unipc_flow(config, spacing), spacing.first, update)


def _predictor(alphas: Float32, log: Float32, step: int, order: int, solver_type: str) -> npt.NDArray[np.float64]:
    """Factors on the x0 of `step` and of those before it, newest first [WIDTH]."""
    system = _System.of(log, step, order, solver_type)
    weights = np.array([0.5]) if order == 2 else system.solve(order - 1)
    return float(alphas[step + 1]) * system.factors(weights)


def _corrector(alphas: Float32, log: Float32, step: int, order: int, solver_type: str) -> npt.NDArray[np.float64]:
    """Factors on the x0 of `step` + 1, `step` and those before it, newest first [WIDTH]."""
    system = _System.of(log, step, order, solver_type)
    weights = np.array([0.5]) if order == 1 else system.solve(order)
    past = float(alphas[step + 1]) * system.factors(weights[:-1])
    fresh = -float(alphas[step + 1]) * system.scale * weights[-1]
    factors = np.append(fresh, past[:-1])
    factors[1] -= fresh
    return factors


class _System:
    """The conditions for the weights of a step's differences of x0, R @ weights = b, in diffusers' notation."""

    def __init__(self, nodes: Float32, moments: Float32, scale: float, phi: float) -> None:
        self.nodes, self.moments, self.scale, self.phi = nodes, moments, scale, phi

    @classmethod
    def of(cls, log: Float32, step: int, order: int, solver_type: str) -> _System:
        """For the step from `step` to `step` + 1: `order` - 1 nodes before `step`, and the node 1 after it."""
        one = np.float32(1)
        h = log[step + 1] - log[step]
        nodes = np.array([*((log[step - back] - log[step]) / h for back in range(1, order)), one], np.float32)
        phi = rounded(np.expm1, -h)[()]
        scale = -h if solver_type == "bh1" else phi
        moments, factorial, phi_k = [], 1, phi / -h - one
        for power in range(1, order + 1):
            moments.append(phi_k * np.float32(factorial) / scale)
            factorial *= power + 1
            phi_k = phi_k / -h - one / np.float32(factorial)
        return cls(nodes, np.array(moments, np.float32), float(scale), float(phi))

    def solve(self, size: int) -> npt.NDArray[np.float64]:
        """The weights of the first `size` nodes."""
        powers = np.array([self.nodes[:size] ** np.float32(power) for power in range(size)], np.float64).reshape(size, size)
        return np.asarray(np.linalg.solve(powers, self.moments[:size].astype(np.float64)), np.float64)

    def factors(self, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Factors on the x0 of the step and of those before it, from the weights of their differences, without alpha [WIDTH]."""
        found = np.zeros(WIDTH)
        found[0] = -self.phi
        for back, weight in enumerate(weights, start=1):
            factor = -self.scale * weight / float(self.nodes[back - 1])
            found[back] += factor
            found[0] -= factor
        return found
