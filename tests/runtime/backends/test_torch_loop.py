"""The torch backend's GPU side on the CPU, with a stand-in for CUDA graphs that keeps to their contract.

While work is captured every operator is noted with the tensors that it read and wrote, and what it wrote over is put back; a
replay does the same operators on the same memory and nothing else. So what a loop bakes in by mistake (a number on the host, a new
tensor in place of a buffer) shows in the image, as it would on a GPU. Streams, real capture and its speed are for a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.base import CapturingBackend
from sana_export.runtime.backends.torch import CudaTorchBackend, reopen

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
#: Latents reach about 10; this is what two orders of float32 summation make of them.
TOLERANCE = 2e-4


class Recorder(TorchDispatchMode):
    """Records every operator with its arguments and results, and what it overwrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.before.append((args[0], args[0].clone()))
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def undo(self) -> None:
        for target, values in reversed(self.before):
            target.copy_(values)

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            if function.is_view:
                continue
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class OnTheCpu(CudaTorchBackend):
    """The GPU backend with its tensors on the CPU."""

    device = "cpu"
    captured: int
    replayed: int

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        with torch.no_grad(), Recorder() as recorder:
            work()
        with torch.no_grad():
            recorder.undo()

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                recorder.replay()

        return replay

    def record_event(self) -> Any:
        return 0.0

    def seconds(self, start: Any, end: Any) -> float:
        return 0.0


def load(bundle: Path, manifest: Manifest) -> OnTheCpu:
    backend = OnTheCpu(bundle, manifest, reopen(bundle, manifest), compiled=False)
    backend.captured = backend.replayed = 0
    return backend


@pytest.fixture
def captured(tiny_bundle: Path) -> Iterator[SanaRuntime]:
    with SanaRuntime.from_pretrained(tiny_bundle, backend=load) as runtime:
        assert isinstance(runtime.backend, CapturingBackend)
        yield runtime


def assert_same_latents(one: SanaRuntime, other: SanaRuntime, prompt: str, **request: Any) -> None:
    found, wanted = (runtime(prompt, output_type="latent", **{**SMALL, **request}).images for runtime in (one, other))
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_one_captured_loop_serves_prompts_seeds_and_scales(captured: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    assert_same_latents(captured, tiny_runtime, "a red fox", seed=1, guidance_scale=4.5)
    assert_same_latents(captured, tiny_runtime, "two blue birds on a wire", seed=2, guidance_scale=7.0)
    assert_same_latents(captured, tiny_runtime, "a red fox", seed=1, guidance_scale=4.5)
    assert captured.backend.captured == 1  # prompts are padded to one length
    assert captured.backend.replayed == 3


def test_other_shapes_are_captured_beside(captured: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    requests: list[dict[str, Any]] = [
        {"guidance_scale": 4.5},
        {"guidance_scale": 4.5, "pag_scale": 2.0},
        {"num_images_per_prompt": 2, "seed": [5, 6]},
        {"guidance_scale": 4.5},
    ]
    for request in requests:
        assert_same_latents(captured, tiny_runtime, "a red fox", **{"seed": 3, **request})
    assert captured.backend.captured == 3


def test_sprint_draws_fresh_noise_every_step(sprint_bundle: Path, sprint_runtime: SanaRuntime) -> None:
    with SanaRuntime.from_pretrained(sprint_bundle, backend=load) as captured:
        for seed in (1, 2):
            assert_same_latents(captured, sprint_runtime, "a fox", seed=seed, num_inference_steps=2)
        assert captured.backend.captured == 1


def test_steps_with_a_callback_are_replayed_one_by_one(captured: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    def halve(runtime: Any, index: int, timestep: float, tensors: dict[str, Any]) -> Any:
        return {"latents": tensors["latents"] * np.float32(0.5)} if index == 0 else None

    assert_same_latents(captured, tiny_runtime, "a fox", seed=4, callback_on_step_end=halve)
    assert captured.backend.captured == 3


def test_segments_are_captured_one_by_one(captured: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    interval = {"num_inference_steps": 5, "guidance_interval": (0.2, 0.8), "pag_scale": 2.0, "pag_interval": (0, 0.4)}
    for seed in (1, 2):
        assert_same_latents(captured, tiny_runtime, "a red fox", seed=seed, **interval)
    assert (captured.backend.captured, captured.backend.replayed) == (4, 8)


def test_images(captured: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    found, wanted = (np.asarray(runtime("a fox", seed=1, **SMALL).images[0], np.int16) for runtime in (captured, tiny_runtime))
    assert np.abs(found - wanted).max() <= 1


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pool of each capture, with PyTorch's CUDA graphs replaced. A capture during which something fails cannot be ended."""
    used: list[Any] = []

    class Graph:
        def replay(self) -> None: ...

    @contextlib.contextmanager
    def graph(target: Graph, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (stream, capture_error_mode) == ("a stream of the cpu", "thread_local")
        used.append(pool)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of the {device}")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return used


def test_all_captured_work_shares_one_pool_of_memory(captured: SanaRuntime, pools: list[Any]) -> None:
    for _ in range(2):
        CudaTorchBackend.capture(captured.backend, lambda: None)
    assert pools[0] is pools[1] is not None


def test_a_failed_capture_tells_its_first_cause(captured: SanaRuntime, pools: list[Any]) -> None:
    def work() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        CudaTorchBackend.capture(captured.backend, work)
