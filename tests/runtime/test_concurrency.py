"""One runtime used from several threads, and by several runs of `steps` at a time.

On the device in the host's memory, whose loops are captured and whose work is enqueued as on a GPU: there, runs of one shape would
overwrite each other's latents if they shared a loop.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.errors import UsageError
from sana_export.machine import Gpu
from sana_export.profiles import Profile
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.trt.compatibility import Host
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def engines(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    with_engines(copy, Profile("wide", (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512))))
    return copy


@pytest.fixture(params=["resident", "staged"])
def runtime(engines: Path, request: pytest.FixtureRequest) -> Iterator[SanaRuntime]:
    device = HostDevice()
    host = Host((Gpu(device.name, device.compute_capability),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")

    def backend(bundle: Path, manifest: Any) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", module=HostTensorRT(device), device=device, machine=host)

    with SanaRuntime.from_pretrained(engines, backend=backend, memory=request.param) as opened:
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


def test_runs_of_one_shape_may_overlap(runtime: SanaRuntime) -> None:
    wanted = [draw(runtime, seed)[0] for seed in (1, 2)]
    plans = [runtime.plan(request_of(seed)) for seed in (1, 2)]
    runs = [runtime.steps(plan, runtime.encode(plan)) for plan in plans]
    for steps in zip(*runs, strict=True):
        last = steps
    for step, latents in zip(last, wanted, strict=True):
        np.testing.assert_array_equal(runtime.to_host(step.latents), latents)


def test_a_call_inside_a_callback_does_not_disturb_the_one_around_it(runtime: SanaRuntime) -> None:
    plain = [runtime(f"prompt number {seed}", seed=seed, output_type="latent", **SMALL).images for seed in (1, 2)]
    inner = []

    def callback(used: SanaRuntime, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        inner.append(used("prompt number 2", seed=2, output_type="latent", **SMALL).images)

    outer = runtime("prompt number 1", seed=1, output_type="latent", callback_on_step_end=callback, **SMALL).images
    np.testing.assert_array_equal(outer, plain[0])
    assert len(inner) == SMALL["num_inference_steps"]
    for images in inner:
        np.testing.assert_array_equal(images, plain[1])


def test_a_run_that_is_closed_early_leaves_the_next_one_right(runtime: SanaRuntime) -> None:
    latents, _ = draw(runtime, 1)
    plan = runtime.plan(request_of(2))
    steps = runtime.steps(plan, runtime.encode(plan))
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(draw(runtime, 1)[0], latents)


def test_weights_must_not_change_between_steps(runtime: SanaRuntime) -> None:
    plan = runtime.plan(request_of(1))
    steps = runtime.steps(plan, runtime.encode(plan))
    next(steps)
    runtime.unload_lora()
    with pytest.raises(UsageError, match="weights changed"):
        next(steps)


def test_a_closed_runtime_says_so(runtime: SanaRuntime) -> None:
    plan = runtime.plan(request_of(1))
    runtime.close()
    runtime.close()
    for call in (lambda: runtime.encode(plan), lambda: runtime("a fox"), lambda: next(runtime.steps(plan, None))):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="is closed") as caught:
            call()
        assert str(runtime.bundle) in str(caught.value.fix)
