"""The candidate `openvino`: on a stand-in for the package, and on the package if it is installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export import SanaRuntime
from sana_export.bench.candidates import Job, openvino
from sana_export.bench.candidates.runtime import WrongDevice
from sana_export.bench.candidates.table import find_row, resolve
from sana_export.bench.workload import Workload
from sana_export.errors import ArtifactError, DependencyError
from sana_export.manifest import Manifest
from sana_export.runtime.backends.base import BackendSettings
from tests.support.openvino_stand_in import stand_in

WORK = Workload("test", 64, 96, 2, 4.5, ("a cute 🐼",))


def job_of(bundle: Path) -> Job:
    return Job("openvino", str(bundle), "checkpoint", None, "fp32", False, (), 1, WORK)


def drawn(bundle: Path) -> Any:
    """The image of the candidate that the table names, and the one of ONNX Runtime."""
    candidate = resolve(find_row("openvino").load)(job_of(bundle))
    with SanaRuntime.from_pretrained(bundle, backend="onnxruntime", threads=1) as runtime:
        image = runtime(WORK.prompts[0], seed=3, **WORK.sampling()).images[0]
    return np.asarray(candidate.generate(WORK.prompts[0], 3).images[0], np.int16), np.asarray(image, np.int16)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = stand_in()
    monkeypatch.setitem(sys.modules, "openvino", module)
    return module


def test_the_candidate_draws_with_every_graph_in_float32(tiny_bundle: Path, package: Any) -> None:
    found, wanted = drawn(tiny_bundle)
    assert np.abs(found - wanted).max() <= 1
    assert {path.parent.name for path, _, _ in package.Core.compiled} >= {"text_encoder", "context", "denoiser", "vae_decoder"}
    for _, device, properties in package.Core.compiled:
        assert device == "CPU"
        assert properties["INFERENCE_PRECISION_HINT"] == "f32"
        assert properties["INFERENCE_NUM_THREADS"] == 1


def test_outputs_outlive_the_next_run(tiny_bundle: Path, package: Any) -> None:
    manifest = Manifest.load(tiny_bundle)
    session = openvino.OpenVinoBackend(tiny_bundle, manifest, BackendSettings()).load("sampler")
    feeds = {
        tensor.name: np.ones([size if isinstance(size, int) else 2 for size in tensor.shape], tensor.dtype)
        for tensor in manifest.graphs["sampler"].spec.inputs
    }
    first = session.run(feeds)["next_latents"]
    before = first.copy()
    second = session.run({**feeds, "latents": feeds["latents"] + 1})["next_latents"]
    np.testing.assert_array_equal(first, before)
    assert (first != second).all()


def test_a_replaced_file_is_compiled_in_place_of_the_bundle_s(tiny_bundle: Path, package: Any, tmp_path: Path) -> None:
    manifest, other = Manifest.load(tiny_bundle), tmp_path / "other.onnx"
    other.write_bytes((tiny_bundle / "onnx/sampler/model.onnx").read_bytes())
    openvino.OpenVinoBackend(tiny_bundle, manifest, BackendSettings(), replaced={"sampler": other}).load("sampler")
    assert [path for path, _, _ in package.Core.compiled] == [other]
    other.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"openvino 0\.0 cannot load .*other\.onnx") as error:
        openvino.OpenVinoBackend(tiny_bundle, manifest, BackendSettings(), replaced={"sampler": other}).load("sampler")
    assert error.value.found == "Check 'model' failed at frontend.cpp:1"


def test_openvino_is_refused_without_the_package_and_on_a_gpu(
    tiny_bundle: Path, package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WrongDevice):
        openvino.load(replace(job_of(tiny_bundle), workload=replace(WORK, device="cuda")))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError) as error:
        openvino.load(job_of(tiny_bundle))
    assert error.value.fix == "pip install openvino"


def test_openvino_itself_draws_the_image_of_onnx_runtime(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    found, wanted = drawn(tiny_bundle)
    assert np.abs(found - wanted).max() <= 1
