"""Every solver and setting against diffusers' class in float32, over whole trajectories: timesteps, sigmas and latents."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
from diffusers import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_export.contract import COEFFICIENTS
from sana_export.runtime.schedule import make_schedule
from sana_export.supported import SCHEDULERS
from tests.support.trajectories import FLOW, compare, config_of, worst_difference

DPM, SINGLE, UNIPC, EULER, HEUN, LCM, _ = SCHEDULERS
#: Largest difference allowed at any step, relative to the largest magnitude of the tensor.
TOLERANCE = 2.5e-6
#: diffusers' third-order terms divide rounding errors of float32 by powers of the step's size.
THIRD_ORDER = 2e-5
#: It solves its systems of three equations in float32.
THIRD_ORDER_UNIPC = 6e-5
SHIFTS = (1.0, 1.8, 3.0, 6.0)
SDE = {"algorithm_type": "sde-dpmsolver++"}
#: The settings that are used most, over every number of steps from 1 to 50 and every shift.
USUAL = {
    "dpm++ 2M": (DPM, FLOW),
    "unipc": (UNIPC, FLOW),
    "euler": (EULER, {}),
}
#: The others over every number of steps up to 20 and some above, with the shifts in turn.
OTHERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "dpm order 1": (DPM, {"solver_order": 1}, TOLERANCE),
    "dpm heun": (DPM, {"solver_type": "heun"}, TOLERANCE),
    "dpm order 3": (DPM, {"solver_order": 3}, THIRD_ORDER),
    "dpm high order to the end": (DPM, {"solver_order": 3, "lower_order_final": False}, THIRD_ORDER),
    "dpm euler at the end": (DPM, {"euler_at_final": True, "lower_order_final": False}, TOLERANCE),
    "dpm dynamic shifting without mu": (DPM, {"use_dynamic_shifting": True}, TOLERANCE),
    "dpm 500 timesteps": (DPM, {"num_train_timesteps": 500, "euler_at_final": True}, TOLERANCE),
    "dpm smallest sigma": (DPM, {"final_sigmas_type": "sigma_min"}, TOLERANCE),
    "dpm smallest sigma, high order": (
        DPM,
        {"final_sigmas_type": "sigma_min", "solver_order": 3, "lower_order_final": False, "beta_schedule": "scaled_linear"},
        THIRD_ORDER,
    ),
    "dpm smallest sigma, euler": (DPM, {"final_sigmas_type": "sigma_min", "euler_at_final": True}, TOLERANCE),
    "dpm sde order 1": (DPM, {**SDE, "solver_order": 1}, TOLERANCE),
    "dpm sde": (DPM, SDE, TOLERANCE),
    "dpm sde heun": (DPM, {**SDE, "solver_type": "heun"}, TOLERANCE),
    "dpm sde order 3": (DPM, {**SDE, "solver_order": 3}, THIRD_ORDER),
    "dpm sde smallest sigma": (DPM, {**SDE, "final_sigmas_type": "sigma_min"}, TOLERANCE),
    **{
        f"singlestep {kind} order {order}": (SINGLE, {"solver_order": order, "solver_type": kind}, THIRD_ORDER)
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun")
    },
    "singlestep smallest sigma": (SINGLE, {"solver_order": 3, "final_sigmas_type": "sigma_min"}, THIRD_ORDER),
    "singlestep lowered": (SINGLE, {"solver_order": 3, "lower_order_final": True, "final_sigmas_type": "sigma_min"}, THIRD_ORDER),
    "unipc order 1": (UNIPC, {"solver_order": 1}, TOLERANCE),
    "unipc order 3": (UNIPC, {"solver_order": 3}, THIRD_ORDER_UNIPC),
    "unipc without corrector": (UNIPC, {"disable_corrector": list(range(50))}, TOLERANCE),
    "unipc without some correctors": (UNIPC, {"solver_order": 3, "disable_corrector": [0, 2, 3]}, THIRD_ORDER_UNIPC),
    "unipc bh1": (UNIPC, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, TOLERANCE),
    "unipc bh1 order 3": (UNIPC, {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "solver_order": 3}, THIRD_ORDER_UNIPC),
    "unipc karras": (UNIPC, {"use_karras_sigmas": True}, TOLERANCE),
    "unipc karras of own range": (UNIPC, {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 20.0}, TOLERANCE),
    "euler stochastic": (EULER, {"stochastic_sampling": True}, TOLERANCE),
    "euler 777 timesteps": (EULER, {"num_train_timesteps": 777}, TOLERANCE),
    "euler karras": (EULER, {"use_karras_sigmas": True}, TOLERANCE),
    "euler exponential": (EULER, {"use_exponential_sigmas": True}, TOLERANCE),
    "lcm": (LCM, {}, TOLERANCE),
    "lcm karras": (LCM, {"use_karras_sigmas": True}, TOLERANCE),
    # The first row of a step is undone with a division by sigma' / sigma, 0.001 for two steps at shift 1.
    "heun": (HEUN, {}, 1e-4),
}


def shift_key(name: str) -> str:
    return "flow_shift" if name in (DPM, SINGLE, UNIPC) else "shift"


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("name", "options"), USUAL.values(), ids=USUAL)
def test_every_number_of_steps(name: str, options: dict[str, Any], shift: float) -> None:
    for steps in range(1, 51):
        assert worst_difference(name, {shift_key(name): shift, **options}, steps) <= TOLERANCE, steps


@pytest.mark.parametrize(("name", "options", "tolerance"), OTHERS.values(), ids=OTHERS)
def test_every_setting(name: str, options: dict[str, Any], tolerance: float) -> None:
    flow = FLOW if name in (DPM, SINGLE, UNIPC) else {}
    for steps, shift in zip([*range(1, 21), 27, 34, 50], cycle(SHIFTS), strict=False):
        found = worst_difference(name, {shift_key(name): shift, **flow, **options}, steps)
        assert found <= tolerance, (steps, shift)


@pytest.mark.parametrize("name", [EULER, LCM, UNIPC])
def test_a_terminal_sigma(name: str) -> None:
    for steps in (2, 5, 20):
        options = {shift_key(name): 3.0, "shift_terminal": 0.1, **(FLOW if name == UNIPC else {})}
        assert worst_difference(name, options, steps) <= TOLERANCE


@given(
    st.sampled_from([*USUAL.values(), *((name, options) for name, options, _ in OTHERS.values())]),
    st.floats(1.0, 6.0),
    st.integers(2, 50),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_any_shift_and_beginning(which: tuple[str, dict[str, Any]], shift: float, steps: int, begin: float) -> None:
    name, options = which
    first = int(begin * steps) * (2 if name == HEUN else 1)
    flow = FLOW if name in (DPM, SINGLE, UNIPC) else {}
    assert worst_difference(name, {shift_key(name): shift, **flow, **options}, steps, first=first) <= 2e-4


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bh1_to_sigma_0_is_defined_here(order: int) -> None:
    """In diffusers the last step multiplies 0 by infinity, so that every image is NaN. Up to there both are equal."""
    scheduler = UniPCMultistepScheduler(solver_type="bh1", solver_order=order, flow_shift=3.0, **FLOW)
    scheduler.set_timesteps(20)
    schedule = make_schedule(config_of(scheduler), 20)
    assert compare(scheduler, schedule, stop=19) <= (THIRD_ORDER_UNIPC if order == 3 else TOLERANCE)
    last = dict(zip(COEFFICIENTS, schedule.coefficients[-1], strict=True))
    assert {name: value for name, value in last.items() if value} == {
        "x0_latents": 1,
        "x0_noise_pred": -schedule.sigmas[-2],
        "x0": 1,
    }
