"""Sampling schedules as tables. Every solver that Sana uses is linear in its inputs, so a row of numbers describes a step.

A step computes, with the columns of its row named as in `contract.COEFFICIENTS`,

    x0           = x0_latents * latents + x0_noise_pred * noise_pred
    next_latents = latents * latents + x0 * x0 + noise * noise + the sum over the x0 of earlier steps of column * x0

where the earlier x0 (`contract.HISTORY`) are those of the step before, of the one before that, and so on (zeros if there was none,
with 0 in their column), and `noise` is fresh standard normal noise (any finite value if its column is 0). After a last step to
sigma 0, latents and x0 are equal.

The rows are equivalent to `step` of diffusers' scheduler of the same name (`solvers/`). Sigmas, their logarithms and exponentials
are rounded to float32 if diffusers computes them in float32; the rest is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sana_export.architectures import SCHEDULER_DEFAULTS
from sana_export.errors import UsageError
from sana_export.runtime.solvers.dpm import dpm_multistep, dpm_singlestep
from sana_export.runtime.solvers.flow_match import flow_euler, flow_heun, flow_lcm
from sana_export.runtime.solvers.sprint import sprint
from sana_export.runtime.solvers.table import (
    DEFAULT_ANGLES,
    SPRINT_INTERMEDIATE_TIMESTEP,
    SPRINT_MAX_TIMESTEP,
    SPRINT_MOST_TIMESTEP,
    Schedule,
    Spacing,
    SprintAngles,
)
from sana_export.runtime.solvers.unipc import unipc
from sana_export.supported import SCHEDULERS, unsupported

__all__ = [
    "DEFAULT_ANGLES",
    "SPRINT_INTERMEDIATE_TIMESTEP",
    "SPRINT_MAX_TIMESTEP",
    "SPRINT_MOST_TIMESTEP",
    "Schedule",
    "SprintAngles",
    "evaluations",
    "make_schedule",
]


@dataclass(frozen=True)
class _Custom:
    """Values that a solver takes in place of a number of steps, largest first."""

    #: The largest value, from the scheduler's config.
    most: Callable[[Mapping[str, Any]], float]
    #: Whether the last value is 0, the end of the run, and not a step.
    ends: bool = False


@dataclass(frozen=True)
class _Solver:
    """One of diffusers' schedulers."""

    #: From the complete config and the requested steps.
    build: Callable[[Mapping[str, Any], Spacing], Schedule]
    #: Evaluations of the denoiser for each step; one for the last one.
    order: int = 1
    #: Whether it has the angles of SANA-Sprint.
    angular: bool = False
    #: Custom timesteps and sigmas, if it takes them.
    timesteps: _Custom | None = None
    sigmas: _Custom | None = None

    @property
    def custom(self) -> dict[str, _Custom]:
        """What it takes in place of a number of steps, by parameter."""
        kinds = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {word: kind for word, kind in kinds.items() if kind is not None}


_TRAINED, _ONE = _Custom(lambda config: config["num_train_timesteps"]), _Custom(lambda config: 1.0)
_SOLVERS: Mapping[str, _Solver] = {
    "DPMSolverMultistepScheduler": _Solver(dpm_multistep),
    "DPMSolverSinglestepScheduler": _Solver(dpm_singlestep),
    "UniPCMultistepScheduler": _Solver(unipc, sigmas=_ONE),
    "FlowMatchEulerDiscreteScheduler": _Solver(flow_euler, timesteps=_TRAINED, sigmas=_ONE),
    "FlowMatchHeunDiscreteScheduler": _Solver(flow_heun, order=2),
    "FlowMatchLCMScheduler": _Solver(flow_lcm, timesteps=_TRAINED, sigmas=_ONE),
    "SCMScheduler": _Solver(sprint, angular=True, timesteps=_Custom(lambda config: SPRINT_MOST_TIMESTEP, ends=True)),
}


def make_schedule(
    config: Mapping[str, Any],
    num_inference_steps: int | None = None,
    angles: SprintAngles = DEFAULT_ANGLES,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    first: int = 0,
) -> Schedule:
    """The schedule of `num_inference_steps` steps, or of custom `timesteps` or `sigmas`, for a scheduler's config.

    With `first`, the steps from that one on, as diffusers samples them after `set_begin_index(first)`: a multistep solver has no
    history there. FlowMatchHeunDiscreteScheduler counts its 2 N - 1 evaluations, and may begin at every second one.

    Raises UsageError for fewer than 1 step, a scheduler that is not in `SCHEDULERS`, a setting that the table cannot express,
    custom values that the scheduler does not take, and `angles` for another checkpoint than SANA-Sprint. An export refuses such a
    checkpoint, but older exports did not.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise UsageError("this scheduler is not supported", found=f"_class_name {name!r}", wanted=" or ".join(SCHEDULERS))
    full = SCHEDULER_DEFAULTS[name] | dict(config)  # older bundles have what the checkpoint's file says, which may lack keys
    for setting in unsupported(name, full, config):
        raise UsageError(
            f"this setting of the {name} is not supported",
            found=f"{setting.key} = {setting.found}",
            wanted=f"{setting.key} = {setting.wanted}",
        )
    solver = _SOLVERS[name]
    steps = _steps(name, full, num_inference_steps, {"timesteps": timesteps, "sigmas": sigmas})
    _check_angles(angles, solver, given=timesteps is not None)
    spacing = Spacing(steps, _tuple(timesteps), _tuple(sigmas), angles, max(first, 0))
    with np.errstate(all="ignore"):  # the logarithm of a last sigma of 0 is infinite; what must be finite is checked below
        schedule = solver.build(full, spacing)
    if first < 0 or not len(schedule.timesteps):
        raise UsageError("no step is left to sample", found=f"first step {first} of {steps}", wanted=f"0 to {steps - 1}")
    if not (np.isfinite(schedule.coefficients).all() and np.isfinite(schedule.sigmas).all()):
        raise UsageError(
            f"{name} has no finite schedule with these steps and settings",
            found=f"{steps} steps",
            wanted="another number of steps, or the class's defaults",
        )
    return schedule


def evaluations(config: Mapping[str, Any]) -> int:
    """How often a step of a scheduler evaluates the denoiser, except for the last one. diffusers calls this its order."""
    return _SOLVERS[config["_class_name"]].order


def _check_angles(angles: SprintAngles, solver: _Solver, *, given: bool) -> None:
    """Raise UsageError for angles that have no effect. `given`: the timesteps are."""
    if angles == DEFAULT_ANGLES or (solver.angular and not given):
        return
    raise UsageError(
        "max_timesteps and intermediate_timesteps make the timesteps, which are given"
        if solver.angular
        else "this checkpoint has no max_timesteps and intermediate_timesteps: they belong to SANA-Sprint",
        found=f"max_timesteps {angles.first:g}, intermediate_timesteps {angles.second}",
        wanted="timesteps alone" if solver.angular else "num_inference_steps alone",
    )


def _tuple(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _steps(name: str, config: Mapping[str, Any], given: int | None, custom: Mapping[str, Sequence[float] | None]) -> int:
    """The number of steps. Raises UsageError for a number below 1 and for custom values that the scheduler does not take."""
    values = {word: numbers for word, numbers in custom.items() if numbers is not None}
    if len(values) > 1:
        raise UsageError("timesteps and sigmas exclude each other", found="both", wanted="one of them")
    for word, numbers in values.items():
        kind = _SOLVERS[name].custom.get(word)
        if kind is None:
            others = [other for other, solver in _SOLVERS.items() if word in solver.custom and not solver.angular]
            takes = " or ".join(_SOLVERS[name].custom) or "num_inference_steps"
            raise UsageError(
                f"{name} takes no custom {word}",
                found=f"{word} of {len(numbers)} numbers",
                wanted=takes if _SOLVERS[name].angular else f"{takes}; or another scheduler: {', '.join(others)}",
                fix=None if _SOLVERS[name].angular else "--scheduler euler",
            )
        _check_custom(word, numbers, kind, config)
        steps = len(numbers) - kind.ends
        if given not in (None, steps):
            raise UsageError(
                f"the number of steps does not match {word}",
                found=f"{given} steps and {len(numbers)} {word}",
                wanted=f"{steps} steps, or no number of steps",
            )
        return steps
    if given is None or given < 1:
        raise UsageError("sampling needs at least one step", found=given, wanted="1 or more")
    return int(given)


def _check_custom(word: str, numbers: Sequence[float], kind: _Custom, config: Mapping[str, Any]) -> None:
    """Raise UsageError unless the numbers fall from at most `kind.most`, and end at 0 if `kind.ends`, above 0 otherwise."""
    values, most = np.array(numbers, np.float32), kind.most(config)
    body = values[:-1] if kind.ends else values
    falling = bool((np.diff(values) < 0).all()) and len(body) > 0
    ended = values[-1] == 0 if kind.ends and len(values) else True
    if not (falling and ended and body[0] <= np.float32(most) and body[-1] > 0):
        end = "ending with 0" if kind.ends else "all above 0"
        raise UsageError(
            f"{word} do not make a schedule",
            found=", ".join(f"{value:g}" for value in numbers) if len(numbers) <= 12 else f"{len(numbers)} numbers",
            wanted=f"numbers that fall from at most {most:g}, {end}",
        )
