"""The coefficient tables against the `step` of diffusers' schedulers, over whole trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler

from sana_export.contract import COEFFICIENTS
from sana_export.errors import UsageError
from sana_export.runtime.schedule import SPRINT_INTERMEDIATE_TIMESTEP, SPRINT_MAX_TIMESTEP, Schedule, make_schedule
from sana_export.supported import SCHEDULERS

#: diffusers passes a tensor to np.array, for which numpy 2 has a warning.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = range(1, 51)
SHAPE = (2, 4, 6, 8)
#: Largest difference allowed at any step of a trajectory, relative to the largest magnitude of the tensor.
TOLERANCE = 2e-6

SANA = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def config_of(scheduler: Any) -> dict[str, Any]:
    """What `save_pretrained` writes to scheduler_config.json."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def advance(
    row: np.ndarray, latents: np.ndarray, output: np.ndarray, previous_x0: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The sampler graph's formula in float32, with columns by name: the next latents and x0."""
    c: Mapping[str, np.float32] = dict(zip(COEFFICIENTS, row, strict=True))
    x0 = c["x0_latents"] * latents + c["x0_noise_pred"] * output
    return c["latents"] * latents + c["x0"] * x0 + c["previous_x0"] * previous_x0 + c["noise"] * noise, x0


def difference(ours: np.ndarray, theirs: torch.Tensor) -> float:
    assert ours.dtype == np.float32
    return float(np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max())


def compare(scheduler: Any, schedule: Schedule, seed: int = 0) -> float:
    """The largest difference of any step, with the same random latents, model outputs and noise."""
    generator, their_noise, our_noise = (torch.Generator().manual_seed(seed + i) for i in (0, 1, 1))
    theirs = torch.randn(SHAPE, generator=generator)
    ours, x0, worst = theirs.numpy(), np.zeros(SHAPE, np.float32), 0.0
    for row, timestep in zip(schedule.coefficients, scheduler.timesteps, strict=True):
        output = torch.randn(SHAPE, generator=generator)
        theirs = scheduler.step(output, timestep, theirs, generator=their_noise, return_dict=False)[0]
        noise = torch.randn(SHAPE, generator=our_noise).numpy() if schedule.needs_noise else np.float32(0)
        ours, x0 = advance(row, ours, output.numpy(), x0, noise)
        worst = max(worst, difference(ours, theirs))
    np.testing.assert_array_equal(ours, x0)
    return worst


def assert_equal_to_diffusers(scheduler: Any, num_inference_steps: int) -> None:
    scheduler.set_timesteps(num_inference_steps)
    schedule = make_schedule(config_of(scheduler), num_inference_steps)
    assert schedule.timesteps.dtype == schedule.coefficients.dtype == np.float32
    assert schedule.coefficients.shape == (num_inference_steps, len(COEFFICIENTS))
    assert schedule.initial_noise_scale == 1.0
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    assert compare(scheduler, schedule, seed=num_inference_steps) <= TOLERANCE


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver_order": 1},
        {"lower_order_final": False},
        {"euler_at_final": True, "lower_order_final": False},
        {"num_train_timesteps": 500, "euler_at_final": True},
    ],
    ids=str,
)
def test_dpm_solver_equals_diffusers(shift: float, options: dict[str, Any]) -> None:
    scheduler = DPMSolverMultistepScheduler(flow_shift=shift, **SANA, **options)
    for num_inference_steps in STEPS:
        assert_equal_to_diffusers(scheduler, num_inference_steps)


def test_published_timesteps() -> None:
    config = config_of(DPMSolverMultistepScheduler(flow_shift=3.0, **SANA))
    published = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert make_schedule(config, 20).timesteps.tolist() == [float(t) for t in published.split()]


@pytest.mark.parametrize(("shift", "num_inference_steps"), [(6.0, 201), (3.0, 501)])
def test_equal_first_timesteps_start_at_the_first_sigma(shift: float, num_inference_steps: int) -> None:
    """By itself diffusers starts at the second and runs out of sigmas. With begin index 0 it equals our schedule."""
    scheduler = DPMSolverMultistepScheduler(flow_shift=shift, **SANA)
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


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("options", [{}, {"stochastic_sampling": True}, {"num_train_timesteps": 777}], ids=str)
def test_flow_euler_equals_diffusers(shift: float, options: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **options)
    for num_inference_steps in STEPS:
        assert_equal_to_diffusers(scheduler, num_inference_steps)


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
    ours, x0 = start.numpy() * np.float32(schedule.initial_noise_scale), np.zeros(SHAPE, np.float32)
    for row, timestep, angle in zip(schedule.coefficients, schedule.timesteps, scheduler.timesteps[:-1], strict=True):
        s, model_input = sprint_reference(scheduler, angle, theirs)
        assert abs(timestep - s.item()) <= (0 if num_inference_steps <= 2 else 2.5e-7)
        assert difference(ours, model_input) <= TOLERANCE
        output = torch.randn(SHAPE, generator=outputs)
        velocity = sprint_velocity(scheduler, s, model_input, output)
        theirs, denoised = scheduler.step(velocity, angle, theirs, generator=their_noise, return_dict=False)
        ours, x0 = advance(row, ours, output.numpy(), x0, torch.randn(SHAPE, generator=our_noise).numpy())
        assert difference(x0, denoised / sigma_data) <= TOLERANCE
    np.testing.assert_array_equal(ours, x0)


DPM, EULER, SCM = SCHEDULERS


@pytest.mark.parametrize(
    ("name", "key", "value", "supported"),
    [
        (DPM, "algorithm_type", "sde-dpmsolver++", "'dpmsolver++'"),
        (DPM, "solver_type", "heun", "'midpoint'"),
        (DPM, "solver_order", 3, "1 or 2"),
        (DPM, "prediction_type", "epsilon", "'flow_prediction'"),
        (DPM, "use_flow_sigmas", False, "True"),
        (DPM, "final_sigmas_type", "sigma_min", "'zero'"),
        (DPM, "thresholding", True, "False"),
        (DPM, "use_karras_sigmas", True, "False"),
        (DPM, "use_exponential_sigmas", True, "False"),
        (DPM, "use_beta_sigmas", True, "False"),
        (DPM, "use_lu_lambdas", True, "False"),
        (DPM, "use_dynamic_shifting", True, "False"),
        (DPM, "flow_shift", -3.0, "positive"),
        (DPM, "num_train_timesteps", "many", "positive"),
        (EULER, "use_dynamic_shifting", True, "False"),
        (EULER, "shift_terminal", 0.1, "None"),
        (EULER, "invert_sigmas", True, "False"),
        (EULER, "use_karras_sigmas", True, "False"),
        (EULER, "use_exponential_sigmas", True, "False"),
        (EULER, "use_beta_sigmas", True, "False"),
        (EULER, "shift", float("inf"), "positive"),
        (SCM, "prediction_type", "epsilon", "'trigflow'"),
    ],
)
def test_unsupported_setting_is_named(name: str, key: str, value: object, supported: str) -> None:
    config = {"_class_name": name, **(SANA if name == DPM else {}), key: value}
    with pytest.raises(UsageError) as caught:
        make_schedule(config, 20)
    assert key in str(caught.value)
    assert repr(value) in str(caught.value.found)
    assert supported in str(caught.value.wanted)


def test_a_missing_key_has_the_default_of_diffusers() -> None:
    with pytest.raises(UsageError, match=r"prediction_type = 'epsilon'.*missing"):
        make_schedule({"_class_name": DPM, "use_flow_sigmas": True}, 20)
    bare, full = {"_class_name": DPM, **SANA}, config_of(DPMSolverMultistepScheduler(**SANA))
    np.testing.assert_array_equal(make_schedule(bare, 7).coefficients, make_schedule(full, 7).coefficients)


@pytest.mark.parametrize("config", [{}, {"_class_name": "DDIMScheduler"}])
def test_unknown_scheduler(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=DPM):
        make_schedule(config, 20)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_inference_steps", [0, -1])
def test_fewer_than_one_step(name: str, num_inference_steps: int) -> None:
    config = {"_class_name": name, **(SANA if name == DPM else {})}
    with pytest.raises(UsageError, match="at least one step"):
        make_schedule(config, num_inference_steps)


def test_sprint_cannot_have_more_steps_than_training() -> None:
    with pytest.raises(UsageError, match="1 to 1000"):
        make_schedule({"_class_name": SCM}, 1001)
