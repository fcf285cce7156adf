"""Schedules: what a config, custom values and the first step make of them, and what is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SCMScheduler

from sana_export.errors import UsageError
from sana_export.runtime.schedule import SPRINT_INTERMEDIATE_TIMESTEP, SPRINT_MAX_TIMESTEP, SprintAngles, make_schedule
from sana_export.supported import SCHEDULERS
from tests.support.trajectories import FLOW, SHAPE, advance, compare, config_of, difference, no_history, worst_difference

#: diffusers passes a tensor to np.array, for which numpy 2 has a warning.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

#: Largest difference allowed at any step of a trajectory, relative to the largest magnitude of the tensor.
TOLERANCE = 2e-6
DPM, SINGLE, UNIPC, EULER, HEUN, LCM, SCM = SCHEDULERS


def test_published_timesteps() -> None:
    config = config_of(DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW))
    published = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert make_schedule(config, 20).timesteps.tolist() == [float(t) for t in published.split()]


@pytest.mark.parametrize(("shift", "num_inference_steps"), [(6.0, 201), (3.0, 501)])
def test_equal_first_timesteps_start_at_the_first_sigma(shift: float, num_inference_steps: int) -> None:
    """By itself diffusers starts at the second and runs out of sigmas. With begin index 0 it equals our schedule."""
    scheduler = DPMSolverMultistepScheduler(flow_shift=shift, **FLOW)
    scheduler.set_timesteps(num_inference_steps - 1)
    assert scheduler.timesteps[0] != scheduler.timesteps[1]
    scheduler.set_timesteps(num_inference_steps)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    schedule = make_schedule(config_of(scheduler), num_inference_steps)
    with pytest.raises(IndexError):
        compare(scheduler, schedule)
    scheduler.set_timesteps(num_inference_steps)
    scheduler.set_begin_index(0)
    assert compare(scheduler, schedule) <= 2 * TOLERANCE


@pytest.mark.parametrize("first", [1, 6, 13, 19])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (DPM, {"solver_order": 2, **FLOW}),
        (DPM, {"solver_order": 3, **FLOW}),
        (DPM, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", **FLOW}),
        (SINGLE, {"solver_order": 3, **FLOW}),
        (UNIPC, {"solver_order": 2, **FLOW}),
        (UNIPC, {"solver_order": 3, "disable_corrector": [6, 7, 14], **FLOW}),
        (EULER, {"stochastic_sampling": True}),
        (LCM, {}),
    ],
    ids=str,
)
def test_a_run_that_begins_later_has_no_history(name: str, options: dict[str, Any], first: int) -> None:
    """As after `set_begin_index`: the first step of the run is of order 1, and the last ones are those of the whole schedule."""
    assert worst_difference(name, options, 20, first=first) <= 1e-5
    assert worst_difference(name, options, 12, first=first // 2) <= 1e-5


@pytest.mark.parametrize("first", [2, 12, 38])
def test_a_run_of_heun_begins_at_an_euler_step(first: int) -> None:
    assert worst_difference(HEUN, {"shift": 3.0}, 20, first=first) <= 1e-5


def test_sigmas_are_those_of_the_noise_that_diffusers_adds() -> None:
    """Before a step the latents are (1 - sigma) * image + sigma * noise, also in SANA-Sprint's variables."""
    image, noise = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    for name, options, add in ((DPM, FLOW, "add_noise"), (UNIPC, FLOW, "add_noise"), (EULER, {"shift": 3.0}, "scale_noise")):
        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(4)
        timestep = scheduler.timesteps[4:5]
        wanted = (
            scheduler.add_noise(image, noise, timestep) if add == "add_noise" else scheduler.scale_noise(image, timestep, noise)
        )
        sigma = float(make_schedule(config_of(scheduler), 9, first=4).sigmas[0])
        np.testing.assert_allclose((1 - sigma) * image + sigma * noise, wanted, atol=1e-6)
    schedule = make_schedule({"_class_name": SCM}, 2)
    for sigma, angle in zip(schedule.sigmas, (SPRINT_MAX_TIMESTEP, SPRINT_INTERMEDIATE_TIMESTEP, 0.0), strict=True):
        n = np.hypot(sigma, 1 - sigma)
        np.testing.assert_allclose((1 - sigma, sigma), (n * np.cos(angle), n * np.sin(angle)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "custom"),
    [
        (EULER, {"shift": 3.0}, {"timesteps": [1000, 700.5, 300]}),
        (EULER, {"shift": 3.0}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
        (EULER, {"shift": 3.0, "shift_terminal": 0.1}, {"sigmas": [1.0, 0.6]}),
        (EULER, {"use_karras_sigmas": True}, {"sigmas": [0.9, 0.6, 0.5]}),
        (LCM, {}, {"timesteps": [999, 500]}),
        (LCM, {}, {"sigmas": [1.0]}),
        (UNIPC, FLOW, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
        (UNIPC, {"flow_shift": 3.0, "solver_order": 3, **FLOW}, {"sigmas": [0.98, 0.9, 0.7, 0.4, 0.2, 0.05]}),
    ],
    ids=str,
)
def test_custom_values_mean_what_they_mean_in_diffusers(name: str, options: dict[str, Any], custom: dict[str, Any]) -> None:
    """Sigmas are shifted. So are those that belong to custom timesteps, which the denoiser gets as they are."""
    assert worst_difference(name, options, len(*custom.values()), **custom) <= TOLERANCE


def test_custom_angles_of_sprint() -> None:
    angles = [1.5, 1.1, 0.4, 0.0]
    scheduler = SCMScheduler()
    scheduler.set_timesteps(3, timesteps=angles, max_timesteps=None, intermediate_timesteps=None)
    schedule, even = make_schedule({"_class_name": SCM}, timesteps=angles), make_schedule({"_class_name": SCM}, 3)
    s = np.sin(scheduler.timesteps) / (np.cos(scheduler.timesteps) + np.sin(scheduler.timesteps))
    np.testing.assert_allclose(schedule.timesteps, s[:-1], rtol=1e-6)
    assert schedule.coefficients.shape == even.coefficients.shape
    assert schedule.needs_noise


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        (DPM, {"timesteps": [900, 500]}, ["DPMSolverMultistepScheduler takes no custom timesteps", EULER]),
        (DPM, {"sigmas": [0.9]}, ["takes no custom sigmas", UNIPC]),
        (SINGLE, {"timesteps": [900]}, ["takes no custom timesteps"]),
        (HEUN, {"sigmas": [0.9]}, ["takes no custom sigmas"]),
        (UNIPC, {"timesteps": [900]}, ["takes no custom timesteps", "sigmas; or"]),
        (SCM, {"sigmas": [0.9]}, ["takes no custom sigmas", "wanted: timesteps"]),
        (EULER, {"timesteps": [900], "sigmas": [0.9]}, ["exclude each other"]),
        (EULER, {"timesteps": [1001, 3]}, ["fall from at most 1000"]),
        (EULER, {"timesteps": [300, 600]}, ["300, 600"]),
        (EULER, {"sigmas": [0.5, 0.5]}, ["fall from at most 1,"]),
        (EULER, {"sigmas": [0.5, 0.0]}, ["all above 0"]),
        (EULER, {"sigmas": [0.5, 0.2], "num_inference_steps": 3}, ["3 steps and 2 sigmas"]),
        (SCM, {"timesteps": [1.5, 1.0]}, ["ending with 0"]),
        (SCM, {"timesteps": [0.0]}, ["ending with 0"]),
        (SCM, {"timesteps": [1.5, 0.0], "angles": SprintAngles(1.4)}, ["which are given"]),
        (EULER, {"num_inference_steps": 5, "first": 5}, ["no step is left"]),
        (EULER, {"num_inference_steps": 5, "first": -1}, ["no step is left"]),
    ],
    ids=str,
)
def test_custom_values_that_do_not_fit(name: str, given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make_schedule({"_class_name": name, **(FLOW if name in (DPM, SINGLE, UNIPC) else {})}, **given)
    for word in words:
        assert word in str(caught.value)


def test_sigmas_of_unipc_exclude_karras() -> None:
    with pytest.raises(UsageError, match="with use_karras_sigmas"):
        make_schedule({"_class_name": UNIPC, "use_karras_sigmas": True, **FLOW}, sigmas=[0.9, 0.5])


def test_a_schedule_that_is_not_finite_is_refused() -> None:
    """diffusers divides 0 by 0: one step starts at sigma 1, which cannot be moved to the terminal sigma."""
    with pytest.raises(UsageError, match="no finite schedule"):
        make_schedule({"_class_name": EULER, "shift_terminal": 0.1}, 1)


def sprint_reference(scheduler: Any, angle: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of the transformer in SanaSprintPipeline: the rescaled timestep and latents."""
    s = torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))
    return s, latents / scheduler.config.sigma_data * torch.sqrt(s**2 + (1 - s) ** 2)


def sprint_velocity(scheduler: Any, s: torch.Tensor, model_input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The input of the scheduler in SanaSprintPipeline."""
    mixed = (1 - 2 * s) * model_input + (1 - 2 * s + 2 * s**2) * output
    return mixed / torch.sqrt(s**2 + (1 - s) ** 2) * scheduler.config.sigma_data


@pytest.mark.parametrize("num_inference_steps", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_sprint_equals_the_pipelines_loop(num_inference_steps: int, sigma_data: float) -> None:
    scheduler = SCMScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(
        num_inference_steps,
        max_timesteps=SPRINT_MAX_TIMESTEP,
        intermediate_timesteps=SPRINT_INTERMEDIATE_TIMESTEP if num_inference_steps == 2 else None,
    )
    scheduler.set_begin_index(0)
    schedule = make_schedule(config_of(scheduler), num_inference_steps)
    assert schedule.needs_noise == (num_inference_steps > 1)
    outputs, their_noise, our_noise = (torch.Generator().manual_seed(seed) for seed in (1, 2, 2))
    start = torch.randn(SHAPE, generator=outputs)
    theirs = start * sigma_data
    ours, history = start.numpy() * np.float32(schedule.initial_noise_scale), no_history()
    for row, timestep, angle in zip(schedule.coefficients, schedule.timesteps, scheduler.timesteps[:-1], strict=True):
        s, model_input = sprint_reference(scheduler, angle, theirs)
        assert abs(timestep - s.item()) <= (0 if num_inference_steps <= 2 else 2.5e-7)
        assert difference(ours, model_input) <= TOLERANCE
        output = torch.randn(SHAPE, generator=outputs)
        velocity = sprint_velocity(scheduler, s, model_input, output)
        theirs, denoised = scheduler.step(velocity, angle, theirs, generator=their_noise, return_dict=False)
        ours, history = advance(row, ours, output.numpy(), history, torch.randn(SHAPE, generator=our_noise).numpy())
        assert difference(history[0], denoised / sigma_data) <= TOLERANCE
    np.testing.assert_array_equal(ours, history[0])


@pytest.mark.parametrize(
    ("name", "key", "value", "supported"),
    [
        (DPM, "algorithm_type", "dpmsolver", "'dpmsolver++'"),
        (DPM, "algorithm_type", "sde-dpmsolver", "'sde-dpmsolver++'"),
        (DPM, "solver_type", "logrho", "'midpoint' or 'heun'"),
        (DPM, "solver_order", 4, "1 or 2 or 3"),
        (DPM, "prediction_type", "epsilon", "'flow_prediction'"),
        (DPM, "use_flow_sigmas", False, "True"),
        (DPM, "final_sigmas_type", "one", "'sigma_min'"),
        (DPM, "thresholding", True, "False"),
        (DPM, "use_karras_sigmas", True, "False"),
        (DPM, "use_exponential_sigmas", True, "False"),
        (DPM, "use_beta_sigmas", True, "False"),
        (DPM, "use_lu_lambdas", True, "False"),
        (DPM, "flow_shift", -3.0, "positive"),
        (DPM, "num_train_timesteps", "many", "positive"),
        (DPM, "num_train_timesteps", 10**12, "at most 1000000"),
        (DPM, "solver_order", 2.0, "1 or 2 or 3"),
        (SINGLE, "algorithm_type", "sde-dpmsolver++", "'dpmsolver++'"),
        (UNIPC, "predict_x0", False, "True"),
        (UNIPC, "solver_p", {"_class_name": DPM}, "None"),
        (UNIPC, "solver_order", 4, "1 or 2 or 3"),
        (UNIPC, "disable_corrector", [0.5], "whole numbers"),
        (UNIPC, "use_dynamic_shifting", True, "False"),
        (UNIPC, "use_exponential_sigmas", True, "False"),
        (UNIPC, "shift_terminal", 1.0, "below 1"),
        (UNIPC, "lower_order_final", False, "the last sigma is 0"),
        (EULER, "use_dynamic_shifting", True, "False"),
        (EULER, "shift_terminal", -0.1, "below 1"),
        (EULER, "invert_sigmas", True, "False"),
        (EULER, "use_beta_sigmas", True, "False"),
        (EULER, "shift", float("inf"), "positive"),
        (LCM, "scale_factors", [0.5], "None"),
        (SCM, "prediction_type", "epsilon", "'trigflow'"),
    ],
)
def test_unsupported_setting_is_named(name: str, key: str, value: object, supported: str) -> None:
    config = {"_class_name": name, **(FLOW if name in (DPM, SINGLE, UNIPC) else {}), key: value}
    with pytest.raises(UsageError) as caught:
        make_schedule(config, 20)
    assert key in str(caught.value)
    assert repr(value) in str(caught.value.found)
    assert supported in str(caught.value.wanted)


def test_a_missing_key_has_the_default_of_diffusers() -> None:
    with pytest.raises(UsageError, match=r"prediction_type = 'epsilon'.*missing"):
        make_schedule({"_class_name": DPM, "use_flow_sigmas": True}, 20)
    bare, full = {"_class_name": DPM, **FLOW}, config_of(DPMSolverMultistepScheduler(**FLOW))
    np.testing.assert_array_equal(make_schedule(bare, 7).coefficients, make_schedule(full, 7).coefficients)


def test_settings_that_exclude_each_other() -> None:
    both = {"_class_name": EULER, "use_karras_sigmas": True, "use_exponential_sigmas": True}
    with pytest.raises(UsageError, match="because use_karras_sigmas is True"):
        make_schedule(both, 3)
    for change in ({"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1]}, {"rescale_betas_zero_snr": True}):
        with pytest.raises(UsageError, match=next(iter(change))):
            make_schedule({"_class_name": DPM, "final_sigmas_type": "sigma_min", **FLOW, **change}, 3)
        make_schedule({"_class_name": DPM, **FLOW, **change}, 3)  # it is not read


@pytest.mark.parametrize("config", [{}, {"_class_name": "DDIMScheduler"}])
def test_unknown_scheduler(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=DPM):
        make_schedule(config, 20)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_inference_steps", [0, -1])
def test_fewer_than_one_step(name: str, num_inference_steps: int) -> None:
    config = {"_class_name": name, **(FLOW if name in (DPM, SINGLE, UNIPC) else {})}
    with pytest.raises(UsageError, match="at least one step"):
        make_schedule(config, num_inference_steps)


def test_sprint_cannot_have_more_steps_than_training() -> None:
    with pytest.raises(UsageError, match="1 to 1000"):
        make_schedule({"_class_name": SCM}, 1001)
