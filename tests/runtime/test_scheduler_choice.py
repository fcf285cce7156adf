"""Another scheduler for one call: its config, and the images of diffusers' pipeline with that scheduler, both in float32."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sana_export.errors import UsageError
from sana_export.export.parity import compare_images
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.scheduler_choice import NAMES, choose_scheduler
from sana_export.supported import SCHEDULERS
from tests.support.trajectories import FLOW

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 6}
DPM, SINGLE, UNIPC, EULER, HEUN, LCM, SCM = SCHEDULERS
SANA = {"_class_name": DPM, "flow_shift": 3.0, **FLOW}


@pytest.fixture
def pipeline(tiny_pipeline: Any) -> Iterator[Any]:
    """diffusers' pipeline, whose scheduler a test may replace."""
    before = tiny_pipeline.scheduler
    yield tiny_pipeline
    tiny_pipeline.scheduler = before


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def assert_same_images(found: Any, wanted: Any) -> None:
    found, wanted = pixels(found), pixels(wanted)
    assert wanted.std() > 20, "the reference is not a flat image"
    parity = compare_images("image", found, wanted, "fp32")
    assert parity.passed, parity


CHOICES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "dpm++2m-heun": ("dpm++2m-heun", DPM, {"solver_type": "heun"}),
    "dpm++3m": ("dpm++3m", DPM, {"solver_order": 3}),
    "dpm++2m-sde": ("dpm++2m-sde", DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2s": ("dpm++2s", SINGLE, {}),
    "unipc": ("UniPC", UNIPC, {}),
    "unipc of order 3": ({"_class_name": UNIPC, "solver_order": 3}, UNIPC, {"solver_order": 3}),
    "euler": ("euler", EULER, {"shift": 3.0}),
    "euler by class": (EULER, EULER, {"shift": 3.0}),
    "stochastic euler": ({"_class_name": EULER, "stochastic_sampling": True}, EULER, {"shift": 3.0, "stochastic_sampling": True}),
    "heun": ("heun", HEUN, {"shift": 3.0}),
    "lcm": ("lcm", LCM, {"shift": 3.0}),
    "another shift": ({"flow_shift": 6.0}, DPM, {"flow_shift": 6.0}),
    "another shift of euler": ({"_class_name": EULER, "shift": 1.5}, EULER, {"shift": 1.5}),
}


@pytest.mark.parametrize(("choice", "name", "changes"), CHOICES.values(), ids=CHOICES)
def test_images_are_those_of_diffusers_with_this_scheduler(
    tiny_runtime: SanaRuntime, pipeline: Any, choice: Any, name: str, changes: dict[str, Any]
) -> None:
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    result = tiny_runtime("a red fox", seed=7, scheduler=choice, **SMALL)
    assert_same_images(result.images, pipeline("a red fox", generator=generator(7), **SMALL).images)
    assert result.scheduler["_class_name"] == name
    assert json.loads(json.dumps(result.scheduler)) == result.scheduler
    for key, value in result.scheduler.items():
        if key in pipeline.scheduler.config and value is not None:
            assert value == pipeline.scheduler.config[key], key


def test_fresh_noise_of_several_seeds(tiny_runtime: SanaRuntime, pipeline: Any) -> None:
    """Each image draws its noise from its own generator, at every step."""
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    wanted = pipeline("a fox", num_images_per_prompt=2, generator=[generator(1), generator(2)], **SMALL).images
    found = tiny_runtime("a fox", num_images_per_prompt=2, seed=[1, 2], scheduler="dpm++2m-sde", **SMALL).images
    assert_same_images(found, wanted)


@pytest.mark.parametrize(
    ("choice", "name", "changes", "custom"),
    [
        ("euler", EULER, {"shift": 3.0}, {"timesteps": [1000.0, 640.0, 300.0]}),
        ("euler", EULER, {"shift": 3.0}, {"sigmas": [1.0, 0.7, 0.2]}),
        ("unipc", UNIPC, {}, {"sigmas": np.array([1.0, 0.7, 0.4, 0.2])}),
    ],
    ids=str,
)
def test_custom_timesteps_and_sigmas(
    tiny_runtime: SanaRuntime, pipeline: Any, choice: str, name: str, changes: dict[str, Any], custom: dict[str, Any]
) -> None:
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    options = {key: value for key, value in SMALL.items() if key != "num_inference_steps"}
    found = tiny_runtime("a fox", seed=3, scheduler=choice, **custom, **options).images
    assert_same_images(found, pipeline("a fox", generator=generator(3), **custom, **options).images)


def test_the_checkpoints_own_scheduler_is_the_default(tiny_runtime: SanaRuntime) -> None:
    plans = [tiny_runtime.plan(Request("a fox", seed=1, scheduler=choice)) for choice in (None, "dpm++2m", {}, DPM)]
    for plan in plans:
        assert plan.scheduler == plans[0].scheduler
        np.testing.assert_array_equal(plan.schedule.coefficients, plans[0].schedule.coefficients)
    assert plans[0].scheduler["flow_shift"] == tiny_runtime.manifest.model.scheduler["flow_shift"]


def test_custom_angles_of_sprint(sprint_runtime: SanaRuntime) -> None:
    """The default's, written out."""
    options = {**SMALL, "num_inference_steps": 2}
    wanted = sprint_runtime("a fox", seed=4, **options)
    found = sprint_runtime("a fox", seed=4, timesteps=[1.57080, 1.3, 0.0], scheduler="scm", **options)
    np.testing.assert_array_equal(pixels(found.images), pixels(wanted.images))
    with pytest.raises(UsageError, match="cannot sample this checkpoint"):
        sprint_runtime("a fox", scheduler="euler", **options)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != SCM])
@pytest.mark.parametrize("old", [SANA, {**SANA, "solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False}])
def test_keys_are_kept_as_from_config_keeps_them(name: str, old: dict[str, Any]) -> None:
    """The class changes with its settings; only `shift` and `flow_shift` are one key here and two in diffusers."""
    before = diffusers.DPMSolverMultistepScheduler.from_config(old)
    explicit = {key: value for key, value in before.config.items() if key != "_use_default_values"}  # as a file has them
    wanted = getattr(diffusers, name).from_config(explicit).config
    found = choose_scheduler(name, {**explicit, "_class_name": DPM})
    for key, value in found.items():
        if key not in ("_class_name", "shift"):
            assert value == wanted[key], key
    assert found.get("shift", 3.0) == 3.0


def test_a_flow_match_checkpoint_takes_a_solver_of_diffusion() -> None:
    found = choose_scheduler("unipc", {"_class_name": EULER, "shift": 2.5, "num_train_timesteps": 500})
    kept = ("flow_shift", "num_train_timesteps", "use_flow_sigmas", "prediction_type", "solver_type")
    assert {key: found[key] for key in kept} == {**FLOW, "flow_shift": 2.5, "num_train_timesteps": 500, "solver_type": "bh2"}


def test_a_whole_config_of_diffusers_is_taken() -> None:
    """Every key that any of the classes writes, also those without an effect."""
    for name in SCHEDULERS:
        if name != SCM:
            config = {**getattr(diffusers, name)().config, "_class_name": name, "_diffusers_version": "0.42.1", **FLOW}
            assert choose_scheduler(copy.deepcopy(config), SANA)["_class_name"] == name
            assert choose_scheduler({**config, "_class_name": UNIPC}, SANA)["solver_type"] in ("bh1", "bh2")


def test_every_name_is_a_supported_class() -> None:
    assert {named.class_name for named in NAMES.values()} == set(SCHEDULERS)
