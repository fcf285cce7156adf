"""What runs between the steps of a call: the caller's callback, and the question whether the call is cancelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sana_export.errors import Cancelled, UsageError
from sana_export.formats.arrays import Array
from sana_export.numeric import shown
from sana_export.runtime.inputs import checked_latents
from sana_export.runtime.plan import Plan
from sana_export.runtime.results import Step

if TYPE_CHECKING:
    from sana_export.runtime.pipeline import SanaRuntime

#: Called after each step with (runtime, step index, timestep, {"latents": float32 [B, C, h, w]}), with the latents scaled as in
#: diffusers. It may return {"latents": array} to continue with other latents.
StepCallback = Callable[["SanaRuntime", int, float, dict[str, Array]], Mapping[str, Any] | None]
#: Whether the call shall end. Called from the thread that makes the call.
IsCancelled = Callable[[], bool]


def check_callbacks(callback: Any, cancelled: Any) -> None:
    """Raise UsageError unless both are functions or None, and diffusers' own kind of callback asks for the latents alone."""
    for name, value in (("callback_on_step_end", callback), ("cancelled", cancelled)):
        if value is not None and not callable(value):
            raise UsageError(f"{name} is not a function", found=shown(value), wanted="a function, or None")
    if (inputs := getattr(callback, "tensor_inputs", None)) is not None and list(inputs) != ["latents"]:
        raise UsageError(
            "callback_on_step_end asks for tensors that the runtime does not have",
            found=", ".join(map(str, inputs)),
            wanted="latents",
        )


def check_cancelled(cancelled: IsCancelled | None) -> None:
    """Raise Cancelled if `cancelled` says so."""
    if cancelled is not None and cancelled():
        raise Cancelled("the call was cancelled")


def call_back(callback: StepCallback, runtime: SanaRuntime, step: Step, plan: Plan) -> None:
    """Pass a copy of the latents to `callback`, and assign the ones that it returns to the step."""
    scale = plan.schedule.latents_scale[step.index]
    returned = callback(runtime, step.index, step.timestep, {"latents": runtime.to_host(step.latents) * scale})
    if returned is None:
        return
    if not isinstance(returned, Mapping) or (unknown := set(returned) - {"latents"}):
        found = type(returned).__name__ if not isinstance(returned, Mapping) else ", ".join(map(str, unknown))
        raise UsageError("callback_on_step_end returned an unknown value", found=found, wanted='None or {"latents": array}')
    if "latents" in returned:
        step.latents = checked_latents(returned["latents"], plan.latents_shape) / scale
