"""One runtime used by several threads, and by several runs of `steps` at a time.

On the device in the host's memory, whose loops are captured and whose work is enqueued as on a GPU: runs of the same shape would
overwrite each other's latents if they shared a loop.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sana_export.errors import DependencyError, UsageError
from sana_export.machine import Gpu
from sana_export.profiles import Profile
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.backends.tensorrt import EngineSession, TensorRTBackend
from sana_export.runtime.loops import KEPT_LOOPS, LoopCache
from sana_export.trt.compatibility import Host
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines
from tests.support.lora_files import diffusers_lora, load_transformer

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def engines(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    with_engines(copy, Profile("wide", (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512))), options={"refittable": True})
    return copy


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_lora(load_transformer(tiny_checkpoint), tmp_path_factory.mktemp("lora"), r=4, lora_alpha=7)


def open_on_host_device(bundle: Path, memory: str) -> SanaRuntime:
    device = HostDevice()
    host = Host((Gpu(device.name, device.compute_capability),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")

    def backend(bundle: Path, manifest: Any) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", module=HostTensorRT(device), device=device, machine=host)

    return SanaRuntime.from_pretrained(bundle, backend=backend, memory=memory)


@pytest.fixture(params=["resident", "staged"])
def runtime(engines: Path, request: pytest.FixtureRequest) -> Iterator[SanaRuntime]:
    with open_on_host_device(engines, request.param) as opened:
        yield opened


def request_of(seed: int) -> Request:
    return Request(f"prompt number {seed}", seed=seed, **SMALL)


def draw(runtime: SanaRuntime, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Latents and image of one request, stage by stage."""
    plan = runtime.plan(request_of(seed))
    *_, last = runtime.steps(plan, runtime.encode(plan))
    return runtime.to_host(last.latents), np.asarray(runtime.decode(plan, last.latents)[0])


def test_stages_called_by_several_threads_do_not_mix(runtime: SanaRuntime) -> None:
    wanted = {seed: draw(runtime, seed) for seed in range(4)}
    found: dict[int, list[Any]] = {seed: [] for seed in wanted}
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                found[seed].append(draw(runtime, seed))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed, (latents, image) in wanted.items():
        assert len(found[seed]) == 5
        for other_latents, other_image in found[seed]:
            np.testing.assert_array_equal(other_latents, latents)
            np.testing.assert_array_equal(other_image, image)


def test_runs_of_the_same_shape_may_overlap(runtime: SanaRuntime) -> None:
    wanted = [draw(runtime, seed)[0] for seed in (1, 2)]
    plans = [runtime.plan(request_of(seed)) for seed in (1, 2)]
    runs = [runtime.steps(plan, runtime.encode(plan)) for plan in plans]
    for steps in zip(*runs, strict=True):
        last = steps
    for step, latents in zip(last, wanted, strict=True):
        np.testing.assert_array_equal(runtime.to_host(step.latents), latents)


def test_a_call_inside_a_callback_does_not_disturb_the_outer_one(runtime: SanaRuntime) -> None:
    plain = [runtime(f"prompt number {seed}", seed=seed, output_type="latent", **SMALL).images for seed in (1, 2)]
    inner = []

    def callback(used: SanaRuntime, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        inner.append(used("prompt number 2", seed=2, output_type="latent", **SMALL).images)

    outer = runtime("prompt number 1", seed=1, output_type="latent", callback_on_step_end=callback, **SMALL).images
    np.testing.assert_array_equal(outer, plain[0])
    assert len(inner) == SMALL["num_inference_steps"]
    for images in inner:
        np.testing.assert_array_equal(images, plain[1])


def test_a_run_that_is_closed_early_does_not_disturb_the_next_one(runtime: SanaRuntime) -> None:
    latents, _ = draw(runtime, 1)
    plan = runtime.plan(request_of(2))
    steps = runtime.steps(plan, runtime.encode(plan))
    next(steps)
    steps.close()
    np.testing.assert_array_equal(draw(runtime, 1)[0], latents)


def test_weights_must_not_change_between_steps(runtime: SanaRuntime, lora: Path) -> None:
    for change in (lambda: runtime.load_lora(lora), runtime.unload_lora):
        plan = runtime.plan(request_of(1))
        steps = runtime.steps(plan, runtime.encode(plan))
        next(steps)
        change()
        with pytest.raises(UsageError, match="weights changed"):
            next(steps)


def test_a_lora_that_is_refused_does_not_end_a_run(runtime: SanaRuntime, tmp_path: Path) -> None:
    latents, _ = draw(runtime, 1)
    plan = runtime.plan(request_of(1))
    steps = runtime.steps(plan, runtime.encode(plan))
    next(steps)
    with pytest.raises(UsageError, match="no LoRA at"):
        runtime.load_lora(tmp_path / "nothing")
    runtime.unload_lora()  # there is none
    *_, last = steps
    np.testing.assert_array_equal(runtime.to_host(last.latents), latents)


def test_a_staged_runtime_holds_one_stage_even_between_steps(engines: Path) -> None:
    """Other calls between two steps load their own graphs; the denoiser is dropped for them, and they are dropped for it."""
    with open_on_host_device(engines, "staged") as runtime:
        latents, _ = draw(runtime, 1)
        plan = runtime.plan(request_of(1))
        for step in runtime.steps(plan, runtime.encode(plan)):
            assert set(runtime.sessions) == {"denoiser", "sampler"}
            denoiser = weakref.ref(runtime.sessions["denoiser"])
            runtime.decode(plan, step.x0)
            assert denoiser() is None
        np.testing.assert_array_equal(runtime.to_host(step.latents), latents)


@pytest.mark.parametrize("shape", [(1, 32, 3, 4), (2, 32, 3, 5), (32, 3, 5)])
def test_assigned_latents_must_have_the_shape_of_the_plan(runtime: SanaRuntime, shape: tuple[int, ...]) -> None:
    """On a GPU, others would be written beyond the loop's memory, or leave a part of it as it was."""
    latents, _ = draw(runtime, 1)
    wrong = np.zeros(shape, np.float32)
    for assigned in (wrong, runtime.backend.to_device(wrong)):
        plan = runtime.plan(request_of(1))
        steps = runtime.steps(plan, runtime.encode(plan))
        next(steps).latents = assigned
        with pytest.raises(UsageError, match="wrong shape") as caught:
            next(steps)
        assert caught.value.found == shape
        assert str(plan.latents_shape) in str(caught.value.wanted)
        with pytest.raises(UsageError, match="wrong shape"):
            runtime.decode(plan, assigned)
        with pytest.raises(UsageError, match="wrong shape"):
            runtime.decode_raw(plan, assigned)
    np.testing.assert_array_equal(draw(runtime, 1)[0], latents)


def test_assigned_latents_may_be_on_the_host_or_the_device(runtime: SanaRuntime) -> None:
    values = np.random.default_rng(0).normal(size=(1, 32, 3, 5)).astype(np.float32)
    results = []
    for assigned in (values, values.tolist(), runtime.backend.to_device(values)):
        plan = runtime.plan(request_of(1))
        for step in runtime.steps(plan, runtime.encode(plan)):
            if step.index == 1:
                step.latents = assigned
        results.append(runtime.to_host(step.latents))
    assert not np.array_equal(results[0], draw(runtime, 1)[0])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 1.0}, {"num_images_per_prompt": 2}, {"prompt": ["a", "b"]}], ids=lambda value: next(iter(value))
)
def test_the_conditioning_of_another_plan_is_refused(runtime: SanaRuntime, changes: dict[str, Any]) -> None:
    plan = runtime.plan(request_of(1))
    other = runtime.plan(Request(**{"prompt": "a", "seed": 1, **SMALL, **changes}))
    with pytest.raises(UsageError, match="belongs to another plan") as caught:
        next(runtime.steps(plan, runtime.encode(other)))
    assert caught.value.wanted == "2 guidance branches of 1 images"
    images = len(other.texts[0][0]) * other.images_per_prompt
    assert caught.value.found == f"{len(other.texts)} guidance branches of {images} images"


def test_the_least_recently_used_loop_is_dropped() -> None:
    cache = LoopCache()
    finished: list[int] = []
    loops = [SimpleNamespace(shape=shape, finish=partial(finished.append, shape)) for shape in range(KEPT_LOOPS + 1)]
    for index in (*range(KEPT_LOOPS), 0, KEPT_LOOPS):
        cache.take(loops[index].shape, lambda: None)  # type: ignore[arg-type, return-value]
        cache.give_back(loops[index])  # type: ignore[arg-type]
    made = [cache.take(loop.shape, lambda: None) for loop in loops]  # type: ignore[arg-type, return-value]
    assert made == [loops[0], None, *loops[2:]]
    assert finished == [1], "its work is done before it is dropped"


def test_work_is_captured_again_if_memory_moved_while_other_steps_were_captured(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_on_host_device(engines, "resident") as runtime:
        wanted = runtime("prompt number 1", seed=1, output_type="latent", **SMALL).images  # captures all steps as one
        gpu, shared = runtime.backend.gpu, runtime.backend.shared  # type: ignore[attr-defined]
        captures, run, moves = gpu.captures, EngineSession.run, [1]

        def move_once(session: EngineSession, feeds: Any, outputs: Any = None) -> Any:
            shared.generation += moves.pop() if moves and "coefficients" in feeds else 0
            return run(session, feeds, outputs)

        monkeypatch.setattr(EngineSession, "run", move_once)
        plan = runtime.plan(request_of(1))
        with contextlib.closing(runtime.steps(plan, runtime.encode(plan))) as steps:
            next(steps)  # captures the first step, in the same loop
        assert gpu.captures == captures + 1
        found = runtime("prompt number 1", seed=1, output_type="latent", **SMALL).images
        assert gpu.captures == captures + 2
        np.testing.assert_array_equal(found, wanted)


def test_an_error_while_closing_does_not_replace_the_first_one(
    engines: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise DependencyError("the GPU cannot be used: waiting for the GPU failed")

    for first in (None, ValueError("the first error")):
        runtime = open_on_host_device(engines, "resident")
        monkeypatch.setattr(runtime.backend, "wait", fail)
        with pytest.raises(ValueError, match="the first error") if first else pytest.raises(DependencyError), runtime:
            if first:
                raise first
        assert not runtime.sessions
    assert "waiting for the GPU failed" in caplog.text


def test_a_closed_runtime_refuses_calls(runtime: SanaRuntime) -> None:
    plan = runtime.plan(request_of(1))
    runtime.close()
    runtime.close()
    for call in (lambda: runtime.encode(plan), lambda: runtime("a fox"), lambda: next(runtime.steps(plan, None))):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="is closed") as caught:
            call()
        assert str(runtime.bundle) in str(caught.value.fix)
