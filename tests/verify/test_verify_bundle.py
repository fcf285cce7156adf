"""verify finds wrong values and passes right ones."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import onnx
import pytest

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.errors import UsageError
from sana_export.export.bundle import export_bundle
from sana_export.files import file_entry
from sana_export.manifest import Manifest
from sana_export.synth.checkpoint import make_checkpoint
from sana_export.verify.bundle import Sampling, measure_ranges, verify_bundle
from sana_export.verify.drawing import Drawing, Pair
from sana_export.verify.graph_checks import GRAPH_CHECKS
from sana_export.verify.quality.measure import NOT_FINITE
from sana_export.verify.quality.result import DIFFUSERS, Drawn, Likeness, Limits, Quality, Sample, Spread

QUICK = Sampling(prompts=["a red apple"], height=96, width=128, steps=3)


def test_the_float32_bundle_passes_with_and_without_pag(controlnet_bundle, controlnet_checkpoint, tmp_path):
    """With every graph that there is."""
    bundle = shutil.copytree(controlnet_bundle, tmp_path / "b")
    report = verify_bundle(bundle, controlnet_checkpoint, QUICK)
    assert report.passed, report.as_text()
    assert [row.name for row in report.graphs] == list(GRAPH_CHECKS)
    assert len(report.images) == 2
    assert min(row.cosine for row in report.graphs) >= 0.999999
    kept = Manifest.load(bundle).parity
    assert kept == report.as_json()


@pytest.mark.parametrize("graph", ["text_encoder", "context", "denoiser", "vae_decoder"])
def test_a_changed_weight_is_found(tiny_bundle, tiny_checkpoint, tmp_path, graph):
    """The manifest gets new hashes, so only the values show it."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    path = bundle / "onnx" / graph / "model.onnx"
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = onnx.numpy_helper.to_array(largest) * np.float32(1.01)
    largest.CopyFrom(onnx.numpy_helper.from_array(values, largest.name))
    onnx.save(model, path)
    manifest = Manifest.load(bundle)
    entry = dataclasses.replace(manifest.graphs[graph], onnx=file_entry(bundle, path), data=())
    dataclasses.replace(manifest, graphs={**manifest.graphs, graph: entry}).save(bundle)
    report = verify_bundle(bundle, tiny_checkpoint, QUICK)
    assert not report.passed
    assert next(row.name for row in report.graphs if not row.passed) == graph


def test_another_checkpoint_is_refused(tiny_bundle, tmp_path):
    other = open_checkpoint(str(make_checkpoint("tiny-random", tmp_path / "c", seed=5)))
    with pytest.raises(UsageError, match="was not exported from") as caught:
        verify_bundle(tiny_bundle, other, QUICK)
    assert str(caught.value.fix).startswith(f"sana-export verify {tiny_bundle} --reference ")


def test_a_checkpoint_that_changed_is_exported_again(tiny_bundle, tiny_checkpoint, tmp_path):
    source = str(make_checkpoint("tiny-random", tmp_path / "c", seed=5))
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, checkpoint=dataclasses.replace(manifest.checkpoint, source=source)).save(bundle)
    with pytest.raises(UsageError, match="was not exported from") as caught:
        verify_bundle(bundle, open_checkpoint(source), QUICK)
    assert str(caught.value.fix).startswith(f"sana-export export {source} -o {bundle}")


def test_ranges_of_a_float32_bundle_are_refused(tiny_bundle):
    with pytest.raises(UsageError, match="no half-precision tensors"):
        measure_ranges(tiny_bundle)


def test_a_bfloat16_bundle_passes(tiny_checkpoint, tmp_path):
    bundle = tmp_path / "b"
    export_bundle(tiny_checkpoint, bundle, precision="bf16")
    report = verify_bundle(bundle, tiny_checkpoint, QUICK)
    assert report.backend.startswith("cpu, bfloat16")
    assert report.passed, report.as_text()


@pytest.mark.parametrize("top1", [90.0, 97.0])
def test_quality_decides_as_parity_does(tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch, top1):
    """Quality is measured on request, with every sampler, and can fail the report. test_quality.py tests what it measures."""
    bundle, base = (shutil.copytree(tiny_bundle, tmp_path / name) for name in ("b", "base"))
    image = np.zeros((1, 1, 3), np.uint8)

    def measured(runtime, pipeline, meter, draw, references, **settings):
        assert meter is None  # the random checkpoint has none
        assert settings.pop("on_progress")
        assert settings == {"prompts": ("a red apple",), "steps": 3, "limits": Limits()}
        assert [reference.name for reference in references] == [str(base), DIFFUSERS]
        request = QUICK.request("a red apple", runtime.manifest.model)
        images = [sampler(request).images.astype(int) for sampler in (draw, *(reference.draw for reference in references))]
        assert np.array_equal(images[0], images[1])
        assert 0 < np.abs(images[0] - images[2]).max() <= 1
        rows = [Likeness(reference.name, Spread(90.0, 90.0, 90.0), Spread(1.0, 1.0, 1.0), top1=97.0) for reference in references]
        sample = Sample("a red apple", 0, 0, image, (image, image), (90.0, 90.0), (1.0, 1.0))
        drawn = Drawn(3, "fp32", {}, "onnxruntime")
        return Quality(str(bundle), drawn, (sample,), tuple(rows), Limits(), None, top1, 99.0, 25.0, 25.1)

    monkeypatch.setattr("sana_export.verify.bundle.measure_quality", measured)
    report = verify_bundle(bundle, tiny_checkpoint, QUICK, quality=True, against=base)
    assert report.passed is (top1 == 97.0)
    assert report.as_json()["quality"]["top1"] == top1
    assert len(report.as_json()["quality"]["images"]) == 1
    assert "real renders 99.0%" in report.as_text()
    # The manifest has the figures, without a row for each image.
    assert Manifest.load(bundle).parity == report.as_json(samples=False)
    assert Manifest.load(base).parity is None


def test_the_other_bundle_is_of_the_same_checkpoint(tiny_bundle, sprint_bundle, tiny_checkpoint):
    with pytest.raises(UsageError, match=re.escape(f"{sprint_bundle} was not exported from")):
        verify_bundle(tiny_bundle, tiny_checkpoint, QUICK, quality=True, against=sprint_bundle)


@pytest.mark.parametrize(("graph", "failed"), [("denoiser", "latents"), ("vae_decoder", "images")])
def test_values_that_are_not_finite_are_failed_rows(tiny_bundle, tiny_checkpoint, tmp_path, graph, failed):
    """All rows are there, and the report says what is wrong."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    path = bundle / "onnx" / graph / "model.onnx"
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = onnx.numpy_helper.to_array(largest) * np.float32(np.nan)
    largest.CopyFrom(onnx.numpy_helper.from_array(values, largest.name))
    onnx.save(model, path)
    manifest = Manifest.load(bundle)
    entry = dataclasses.replace(manifest.graphs[graph], onnx=file_entry(bundle, path), data=())
    dataclasses.replace(manifest, graphs={**manifest.graphs, graph: entry}).save(bundle)
    report = verify_bundle(bundle, tiny_checkpoint, QUICK)
    assert not report.passed
    assert [row.name for row in report.graphs if row.name == graph and not row.passed] == [graph]
    assert not any(row.passed for row in getattr(report, failed))
    assert all(row.passed is (graph == "vae_decoder") for row in report.latents)
    assert all(NOT_FINITE in row.limit for row in report.images)
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["passed"] is False
    assert report.as_text().endswith("NOT passed")


def test_a_blank_image_fails_however_wide_the_limit(quantized_bundle, tiny_checkpoint, tmp_path, monkeypatch):
    """Beside a pale reference, a white image has 20 dB, and 4-bit weights only need 12."""
    bundle = shutil.copytree(quantized_bundle, tmp_path / "b")
    pale = np.random.default_rng(0).integers(200, 256, (1, 32, 32, 3), dtype=np.uint8)
    latents = np.zeros((1, 4, 1, 1), np.float32)

    def sample(runtime, pipeline, request):
        blank = np.full_like(pale, 228)
        return Pair(*(Drawing(latents, images, np.array([True])) for images in (blank, pale)))

    monkeypatch.setattr("sana_export.verify.bundle.sample_both", sample)
    report = verify_bundle(bundle, tiny_checkpoint, QUICK)
    assert all(row.passed for row in report.graphs), report.as_text()
    assert all(row.psnr_db > 12 and not row.passed and "blank: 100%" in row.limit for row in report.images)
    assert not report.passed
