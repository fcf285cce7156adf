"""The native solvers of flow matching: diffusers' FlowMatch schedulers (EulerDiscrete, LCM, HeunDiscrete)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sana_export.formats.arrays import Float32
from sana_export.runtime.solvers.flows import euler_flow, heun_flow
from sana_export.runtime.solvers.table import Schedule, Spacing, Update, flow_schedule


def flow_euler(config: Mapping[str, Any], spacing: Spacing) -> Schedule:
    """Euler steps; with `stochastic_sampling`, fresh noise on x0."""
    noisy = bool(config["stochastic_sampling"])
    return flow_schedule(euler_flow(config, spacing), spacing.first, _fresh if noisy else _euler, noisy=noisy)


def flow_lcm(config: Mapping[str, Any], spacing: Spacing) -> Schedule:
    """Fresh noise on x0 in every step."""
    return flow_schedule(euler_flow(config, spacing), spacing.first, _fresh, noisy=True)


def _euler(sigmas: Float32) -> Update:
    ratio = sigmas[1:].astype(np.float64) / sigmas[:-1]
    return Update(ratio, 1 - ratio[:, None])


def _fresh(sigmas: Float32) -> Update:
    after = sigmas[1:].astype(np.float64)
    return Update(0, 1 - after[:, None], after)


def flow_heun(config: Mapping[str, Any], spacing: Spacing) -> Schedule:
    """Heun's method: an Euler step, then the same step with the mean of the velocities at its ends. N steps take 2 N - 1 rows.

    The second row starts from the latents before the first one. They are not kept: the first row is undone.
    """

    def update(sigmas: Float32) -> Update:
        exact = sigmas.astype(np.float64)
        latents, x0 = np.zeros(len(exact) - 1), np.zeros((len(exact) - 1, 2))
        for row in range(0, len(exact) - 1, 2):
            now, after = exact[row], exact[row + 1]
            ratio = after / now
            latents[row], x0[row, 0] = ratio, 1 - ratio
            if row + 2 < len(exact):
                part = 0.5 * (after - now)
                base = np.array([1, -(1 - ratio)]) / ratio  # on the latents and the previous x0
                found = base * (1 + part / now) + np.array([part / after, -part / now])
                latents[row + 1], x0[row + 1] = found[0], (-part / after, found[1])
        return Update(latents, x0)

    return flow_schedule(heun_flow(config, spacing), spacing.first, update)
