"""Sessions that capture, on ONNX Runtime's CPU provider, which has the same buffers and bindings but captures nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import onnxruntime_graphs
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from sana_export.runtime.backends.onnxruntime_graphs import GRAPH_ID, PROVIDER_OPTIONS, GraphedSession
from sana_export.runtime.sampling import sampler_feeds

(GRAPHS_ON,) = PROVIDER_OPTIONS.items()
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}


class Pretender(OnnxRuntimeBackend):
    """The backend as on a GPU, but with ONNX Runtime's CPU provider."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        super().__init__(bundle, manifest)
        self._cuda_graphs, self._provider, self.sessions = True, "CPUExecutionProvider", []

    def _load_captured(self, graph: str) -> GraphedSession | None:
        session = super()._load_captured(graph)
        self.sessions.append(session)
        return session


@pytest.fixture
def session_options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The providers of all new sessions. Their options are not passed on, because the CPU provider does not know them."""
    asked: list[Any] = []
    original = onnxruntime.InferenceSession

    def make(path: str, options: Any, providers: list[Any]) -> Any:
        asked.append(providers)
        return original(path, options, providers=[entry[0] if isinstance(entry, tuple) else entry for entry in providers][:1])

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    return asked


@pytest.fixture
def graph_ids(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The numbers of the graphs that runs were prepared for."""
    ids: list[str] = []
    original = onnxruntime.RunOptions

    class RunOptions:
        def __new__(cls) -> Any:
            options = original()
            return Spy(options)

    class Spy:
        def __init__(self, options: Any) -> None:
            self.options = options

        def add_run_config_entry(self, name: str, value: str) -> None:
            if name == GRAPH_ID:
                ids.append(value)
            self.options.add_run_config_entry(name, value)

    original_run = onnxruntime.InferenceSession.run_with_iobinding

    def run(self: Any, binding: Any, options: Any = None) -> None:
        original_run(self, binding, options.options if isinstance(options, Spy) else options)

    monkeypatch.setattr(onnxruntime, "RunOptions", RunOptions)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run)
    return ids


def test_images_are_the_same(
    tiny_bundle: Path, tiny_runtime: SanaRuntime, graph_ids: list[str], session_options: list[Any]
) -> None:
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend=Pretender)
    assert [providers[0] for providers in session_options].count(("CPUExecutionProvider", PROVIDER_OPTIONS)) == 2
    requests = [
        {"prompt": "a fox", "seed": 1},
        {"prompt": "a fox", "seed": 2},
        {"prompt": "a very long fox", "seed": 2},
        {"prompt": "a fox", "seed": 1, "pag_scale": 2.0},
        {"prompt": "a fox", "seed": 1},
    ]
    for request in requests:
        found, wanted = (one(**request, **SMALL, output_type="latent").images for one in (runtime, tiny_runtime))
        np.testing.assert_array_equal(found, wanted)
    # Two prompt lengths and another number of branches for the denoiser; for the sampler, branches alone count.
    assert graph_ids == ["1", "1", "2", "3", "2"]


def test_results_stay_the_same_when_the_next_run_writes(tiny_bundle: Path) -> None:
    backend = Pretender(tiny_bundle, Manifest.load(tiny_bundle))
    session = backend._load_captured("sampler")
    assert session is not None
    array = np.random.default_rng(0).normal(size=(1, 32, 2, 3)).astype(np.float32)
    coefficients = np.array([1, -0.5, 0.25, 2, 3, 4], np.float32)
    feeds = sampler_feeds(array[None], array, array, array, coefficients, np.ones(1, np.float32))
    first = session.run(feeds)
    kept = first["x0"].numpy().copy()
    second = session.run({**feeds, "latents": first["x0"]})
    np.testing.assert_array_equal(first["x0"].numpy(), kept)
    np.testing.assert_allclose(second["x0"].numpy(), 0.0, atol=1e-6)
    feeds["latents"][:] = 0.0  # an array may be filled anew
    np.testing.assert_allclose(session.run(feeds)["x0"].numpy(), -0.5 * feeds["noise_pred"][0], atol=1e-6)


def test_a_session_that_cannot_capture_falls_back_with_the_reason(
    tiny_bundle: Path, tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One session fails when it is created, as ONNX Runtime refuses control flow, and one when it captures."""
    original = onnxruntime.InferenceSession

    def make(path: str, options: Any, providers: list[Any]) -> Any:
        if GRAPHS_ON in providers[0][1].items() and "denoiser" in path:
            raise RuntimeError("This session cannot use the graph capture feature\nmore")
        return original(path, options, providers=["CPUExecutionProvider"])

    def refuse(*_: Any) -> Any:
        raise RuntimeError("capture failed")

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    monkeypatch.setattr(GraphedSession, "_bind", refuse)
    with caplog.at_level(logging.WARNING):
        runtime = SanaRuntime.from_pretrained(tiny_bundle, backend=Pretender)
        found = runtime("a fox", seed=1, **SMALL, output_type="latent").images
    np.testing.assert_array_equal(found, tiny_runtime("a fox", seed=1, **SMALL, output_type="latent").images)
    said = [record.getMessage() for record in caplog.records]
    assert "onnxruntime runs denoiser without a CUDA graph: This session cannot use the graph capture feature" in said
    assert said.count("onnxruntime runs sampler without a CUDA graph: capture failed") == 1


def test_the_number_of_captured_shapes_is_limited(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime_graphs, "MOST_SHAPES", 1)
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend=Pretender)
    runtime("a fox", seed=1, **SMALL)
    assert not caplog.records
    runtime("a fox", seed=1, **{**SMALL, "height": 64})
    assert "1 shapes are captured" in caplog.text
