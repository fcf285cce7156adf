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
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from sana_export.runtime.backends.onnxruntime_graphs import PROVIDER_OPTIONS, GraphedSession
from sana_export.runtime.sampling import sampler_feeds

(GRAPHS_ON,) = PROVIDER_OPTIONS.items()
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}


class Pretender(OnnxRuntimeBackend):
    """The backend as on a GPU, but with ONNX Runtime's CPU provider."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        super().__init__(bundle, manifest)
        self._cuda_graphs, self.sessions = True, []

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


def test_images_are_the_same_and_other_shapes_run_without_a_graph(
    tiny_bundle: Path, tiny_runtime: SanaRuntime, session_options: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU, a replay after work for other shapes had run failed with an illegal memory access."""
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend=Pretender)
    assert [providers[0] for providers in session_options].count(("CPUExecutionProvider", PROVIDER_OPTIONS)) == 2
    given_up: list[int] = []
    for request in (
        {"prompt": "a fox", "seed": 1},
        {"prompt": "a fox", "seed": 2},
        {"prompt": "a very long fox with a very long tail in the deep snow at night", "seed": 2},
        {"prompt": "a fox", "seed": 1, "pag_scale": 2.0},
        {"prompt": "a fox", "seed": 1},
    ):
        found, wanted = (one(**request, **SMALL, output_type="latent").images for one in (runtime, tiny_runtime))
        np.testing.assert_array_equal(found, wanted)
        given_up.append(len(caplog.records))
    # The denoiser's shapes change with the length of the prompt, and both graphs' with the number of branches.
    assert given_up == [0, 0, 1, 2, 2]
    assert "onnxruntime runs denoiser without a CUDA graph: the shapes of its inputs have changed" in caplog.text


def test_results_stay_the_same_when_the_next_run_writes(tiny_bundle: Path) -> None:
    backend = Pretender(tiny_bundle, Manifest.load(tiny_bundle))
    session = backend._load_captured("sampler")
    assert session is not None
    array = np.random.default_rng(0).normal(size=(1, 32, 2, 3)).astype(np.float32)
    coefficients = np.array([1, -0.5, 0.25, 2, 3, 5, 6, 4], np.float32)
    feeds = sampler_feeds(array[None], array, [array] * 3, array, coefficients, np.ones(1, np.float32))
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
