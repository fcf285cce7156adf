"""Another scheduler than the checkpoint's, for one call: by a short name, by diffusers' class name, or by a config."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sana_export.architectures import SCHEDULER_DEFAULTS
from sana_export.errors import UsageError
from sana_export.numeric import shown
from sana_export.supported import SCHEDULERS

#: A parameter `scheduler` of a call: a name, or diffusers' config with `_class_name`.
Choice = str | Mapping[str, Any]

SPRINT_SCHEDULER = "SCMScheduler"

#: Most bits of an integer in a config. The largest integers cannot be converted to floats or to text.
MOST_BITS = 64


@dataclass(frozen=True)
class NamedScheduler:
    """A scheduler under a short name."""

    #: The class in diffusers.
    class_name: str
    #: The settings that the name stands for.
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_DPM = "DPMSolverMultistepScheduler"
_SOLVED, _STOCHASTIC = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}
#: Short names, as other programs use them.
NAMES: Mapping[str, NamedScheduler] = {
    "dpm++2m": NamedScheduler(_DPM, {**_SOLVED, "solver_order": 2, "solver_type": "midpoint"}),
    "dpm++2m-heun": NamedScheduler(_DPM, {**_SOLVED, "solver_order": 2, "solver_type": "heun"}),
    "dpm++3m": NamedScheduler(_DPM, {**_SOLVED, "solver_order": 3}),
    "dpm++2m-sde": NamedScheduler(_DPM, {**_STOCHASTIC, "solver_order": 2, "solver_type": "midpoint"}),
    "dpm++3m-sde": NamedScheduler(_DPM, {**_STOCHASTIC, "solver_order": 3}),
    "dpm++2s": NamedScheduler("DPMSolverSinglestepScheduler", {**_SOLVED, "solver_order": 2, "solver_type": "midpoint"}),
    "unipc": NamedScheduler("UniPCMultistepScheduler"),
    "euler": NamedScheduler("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "heun": NamedScheduler("FlowMatchHeunDiscreteScheduler"),
    "lcm": NamedScheduler("FlowMatchLCMScheduler"),
    "scm": NamedScheduler(SPRINT_SCHEDULER),
}
_TAKEN_BY_DPM = {
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    "algorithm_type": {"deis": "dpmsolver++"},
}
#: Values that a class takes for another of its own, so that the config of another class fits.
_TAKEN_FOR: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    _DPM: _TAKEN_BY_DPM,
    "DPMSolverSinglestepScheduler": _TAKEN_BY_DPM,
    "UniPCMultistepScheduler": {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
}
#: One quantity under two names: the shift of a flow's sigmas.
_SAME = {"shift": "flow_shift", "flow_shift": "shift"}
#: Keys of diffusers' schedulers without an effect on a flow, in Sana's pipelines.
_WITHOUT_EFFECT = frozenset(
    {
        *(
            "dynamic_thresholding_ratio",
            "sample_max_value",
            "lambda_min_clipped",
            "variance_type",
            "timestep_spacing",
            "steps_offset",
        ),
        *("time_shift_type", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "upscale_mode"),
    }
)


def choose_scheduler(choice: Choice | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the scheduler that a call asks for, with all keys that sampling reads. None: `own`, the checkpoint's.

    A key that `choice` leaves out has the value of the checkpoint's scheduler if that has the key, as with diffusers'
    `Scheduler.from_config(pipeline.scheduler.config)`, and the class's default otherwise. Other than there, `shift` and
    `flow_shift` are one key, and a solver from diffusion samples the flow (`use_flow_sigmas`, "flow_prediction").

    Raises UsageError for an unknown name, class or key, and for a scheduler that cannot sample the checkpoint.
    """
    before = str(own.get("_class_name"))
    name, settings = (before, {}) if choice is None else _parsed(choice, before)
    if choice is None and name not in SCHEDULERS:
        return dict(own)  # `make_schedule` refuses it
    if (name == SPRINT_SCHEDULER) != (before == SPRINT_SCHEDULER):
        sprint = before == SPRINT_SCHEDULER
        raise UsageError(
            f"{name} cannot sample this checkpoint",
            found="a SANA-Sprint checkpoint" if sprint else "a checkpoint that is not SANA-Sprint",
            wanted=SPRINT_SCHEDULER if sprint else ", ".join(name for name in NAMES if NAMES[name].class_name != SPRINT_SCHEDULER),
        )
    defaults, given = SCHEDULER_DEFAULTS[name], SCHEDULER_DEFAULTS.get(before, {}) | dict(own)
    flow = {key: value for key, value in (("use_flow_sigmas", True), ("prediction_type", "flow_prediction")) if key in defaults}
    kept = dict(_shared(defaults, given))
    base = kept if name == before else flow | kept
    return {"_class_name": name, **dict(_taken(name, defaults | base | dict(_shared(defaults, settings))))}


def check_scheduler(choice: Any) -> None:
    """Check what does not depend on the checkpoint: the type, the name, and the keys. Raises UsageError."""
    if choice is None:
        return
    if not isinstance(choice, str | Mapping):
        wanted = 'a name such as "unipc", or a config {"_class_name": ..., ...}'
        raise UsageError("scheduler is not a name or a config", found=shown(choice), wanted=wanted)
    values = choice.values() if isinstance(choice, Mapping) else ()
    if (huge := next((value for value in values if isinstance(value, int) and value.bit_length() > MOST_BITS), None)) is not None:
        raise UsageError("a number in scheduler is too large", found=shown(huge), wanted=f"integers of at most {MOST_BITS} bits")
    _parsed(choice, SCHEDULERS[0])


def _parsed(choice: Choice, before: str) -> tuple[str, Mapping[str, Any]]:
    """The class that a choice names, and its settings."""
    if isinstance(choice, Mapping):
        name = choice.get("_class_name", before)
        _check_keys(choice)
        settings: Mapping[str, Any] = choice
    else:
        named = NAMES.get(choice.strip().lower(), NamedScheduler(choice.strip()))
        name, settings = named.class_name, named.settings
    if not isinstance(name, str) or name not in SCHEDULERS:
        near = difflib.get_close_matches(str(name), [*NAMES, *SCHEDULERS], n=1)
        raise UsageError(
            f"unknown scheduler {shown(name)}" if not str(name).endswith("Scheduler") else f"{name} is not supported",
            found=shown(name),
            wanted=f"{', '.join(NAMES)}; or a class of diffusers: {', '.join(SCHEDULERS)}",
            fix=f"--scheduler {near[0]}" if near else None,
        )
    return name, settings


def _check_keys(config: Mapping[Any, Any]) -> None:
    """Raise UsageError for a key that no supported scheduler has."""
    known = {key for defaults in SCHEDULER_DEFAULTS.values() for key in defaults} | _WITHOUT_EFFECT
    for key in config:
        if not isinstance(key, str) or not (key in known or key.startswith("_")):
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UsageError(
                f"no scheduler has a setting {shown(key)}",
                found=shown(key),
                wanted=f"{near[0]}?" if near else ", ".join(sorted(known)),
            )


def _shared(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of `config` that a class with these `defaults` has."""
    for key in defaults:
        same = _SAME.get(key)
        if key in config:
            yield key, config[key]
        elif same in config:
            yield key, config[str(same)]


def _taken(name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a config as its class takes them."""
    for key, value in config.items():
        others = _TAKEN_FOR.get(name, {}).get(key, {})
        yield key, others.get(value, value) if isinstance(value, str) else value
