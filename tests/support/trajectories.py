"""A coefficient table and the `step` of diffusers' scheduler over whole trajectories, with the same random inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from sana_export.contract import COEFFICIENTS, HISTORY
from sana_export.runtime.schedule import Schedule, make_schedule

SHAPE = (2, 3, 4, 5)
#: What makes a solver of diffusion sample a flow.
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

Array = npt.NDArray[np.float32]


def config_of(scheduler: Any) -> dict[str, Any]:
    """What `save_pretrained` writes to scheduler_config.json."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def advance(row: Array, latents: Array, output: Array, history: Sequence[Array], noise: Any) -> tuple[Array, list[Array]]:
    """The sampler graph's formula in float32, with columns by name: the next latents, and the x0 of this step before the others."""
    c: Mapping[str, np.float32] = dict(zip(COEFFICIENTS, row, strict=True))
    x0 = c["x0_latents"] * latents + c["x0_noise_pred"] * output
    past = sum(c[name] * before for name, before in zip(HISTORY, history, strict=True))
    return c["latents"] * latents + c["x0"] * x0 + past + c["noise"] * noise, [x0, *history[:-1]]


def no_history(shape: tuple[int, ...] = SHAPE) -> list[Array]:
    return [np.zeros(shape, np.float32)] * len(HISTORY)


def difference(ours: Array, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest magnitude of the tensor."""
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max())


def compare(scheduler: Any, schedule: Schedule, seed: int = 0, first: int = 0, stop: int | None = None) -> float:
    """The largest difference of any step before `stop`. `scheduler` has its timesteps and, for `first`, its begin index."""
    generator, their_noise, our_noise = (torch.Generator().manual_seed(seed + i) for i in (0, 1, 1))
    given = {"generator": their_noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
    theirs = torch.randn(SHAPE, generator=generator)
    ours, history, worst = theirs.numpy(), no_history(), 0.0
    for row, timestep in zip(schedule.coefficients[:stop], scheduler.timesteps[first:stop], strict=True):
        output = torch.randn(SHAPE, generator=generator)
        theirs = scheduler.step(output, timestep, theirs, return_dict=False, **given)[0]
        noise = torch.randn(SHAPE, generator=our_noise).numpy() if schedule.needs_noise else np.float32(0)
        ours, history = advance(row, ours, output.numpy(), history, noise)
        worst = max(worst, difference(ours, theirs))
    if scheduler.sigmas[-1] == 0 and stop is None:
        np.testing.assert_array_equal(ours, history[0])
    return worst


def worst_difference(name: str, options: Mapping[str, Any], steps: int, *, first: int | None = None, **custom: Any) -> float:
    """The largest difference to diffusers' class `name` with `options`, in float32. Timesteps and sigmas must be equal."""
    scheduler = getattr(diffusers, name)(**options)
    # As users of diffusers have to: UniPC multiplies what it is given.
    scheduler.set_timesteps(**({word: np.array(values) for word, values in custom.items()} or {"num_inference_steps": steps}))
    if first is not None:
        scheduler.set_begin_index(first)
    schedule = make_schedule(config_of(scheduler), None if custom else steps, first=first or 0, **custom)
    assert schedule.timesteps.dtype == schedule.coefficients.dtype == schedule.sigmas.dtype == np.float32
    assert schedule.coefficients.shape == (len(schedule.timesteps), len(COEFFICIENTS))
    assert schedule.initial_noise_scale == 1.0
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps[first or 0 :].numpy().astype(np.float32))
    np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas[first or 0 :].numpy(), rtol=3e-7)
    return compare(scheduler, schedule, steps, first or 0)
