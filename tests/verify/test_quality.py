"""The embedded `tiny` draws what the prompt says, and the quality meter notices if it does not."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sana_export
from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.errors import ArtifactError
from sana_export.export.parity import ssim
from sana_export.runtime import SanaRuntime
from sana_export.runtime.request import Request
from sana_export.verify.bundle import sample_both
from sana_export.verify.quality import Meter, Quality, measure_quality
from sana_export.verify.reference import load_reference
from tests.support.bundles import exported

PACKAGE = Path(sana_export.__file__).parent


@pytest.fixture(scope="module")
def drawing_checkpoint() -> Any:
    """The alias `tiny`: the trained checkpoint of the package."""
    return open_checkpoint("tiny")


@pytest.fixture(scope="module")
def meter(drawing_checkpoint: Any) -> Meter:
    found = Meter.find(drawing_checkpoint.folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def drawing(drawing_checkpoint: Any, build_cache: Path) -> tuple[SanaRuntime, Any]:
    """The fp32 bundle of `tiny` in ONNX Runtime, and diffusers' pipeline."""
    bundle = exported(drawing_checkpoint, build_cache / f"drawing-{drawing_checkpoint.sha256[:12]}")
    runtime = SanaRuntime.from_pretrained(bundle, backend="onnxruntime")
    return runtime, load_reference(drawing_checkpoint, runtime.manifest.options, pag=False)


def test_the_embedded_checkpoint_is_part_of_the_package(drawing_checkpoint: Any) -> None:
    folder = drawing_checkpoint.folder
    assert folder == PACKAGE / "models" / "tiny"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    patterns = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sana_export"]
    for path in files:
        assert any(fnmatch(path.relative_to(PACKAGE).as_posix(), pattern.replace("**/", "")) for pattern in patterns), path


def test_fp16_files_do_not_make_it_one_of_the_clamped_family(drawing_checkpoint: Any, tmp_path: Path) -> None:
    assert drawing_checkpoint.base_weights("transformer").dtype() == "F16"
    copy = shutil.copytree(drawing_checkpoint.folder, tmp_path / "copy")
    for checkpoint in (drawing_checkpoint, open_checkpoint(str(copy))):
        assert checkpoint.trained_with_clamp().on is False
        assert not checkpoint.synthetic
        assert checkpoint.variant is not None
        assert checkpoint.variant.alias == "tiny"


def test_it_is_sampled_at_its_own_size_by_default(drawing: tuple[SanaRuntime, Any]) -> None:
    runtime, pipeline = drawing
    plan = runtime.plan(Request("a red apple", seed=0, guidance_scale=4.5, num_inference_steps=20))
    assert plan.latents_shape == (1, 32, 4, 4)
    assert (plan.output_height, plan.output_width) == (128, 128)
    request = Request("a red apple", seed=3, num_inference_steps=2, guidance_scale=4.5, height=128, width=128)
    ours, theirs = sample_both(runtime, pipeline, request).images
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_it_draws_what_the_prompt_says(drawing: tuple[SanaRuntime, Any], meter: Meter) -> None:
    """There are 84 concepts, so a model without training could not reach this share."""
    runtime, _ = drawing
    prompts = meter.prompts[:: len(meter.prompts) // 24]
    images = runtime([text for text, _ in prompts], seed=5).images
    found = meter.classify(np.stack([np.asarray(image) for image in images]))
    assert np.mean(found == [concept for _, concept in prompts]) >= 0.7


def test_the_classifier_recognizes_the_real_renders(meter: Meter) -> None:
    assert len(meter.prompts) == 200
    assert meter.renders.shape == (len(meter.concepts), 128, 128, 3)
    assert np.mean(meter.classify(meter.renders) == meter.render_concepts) >= 0.98


def test_measures_follow_the_images(drawing: tuple[SanaRuntime, Any], meter: Meter) -> None:
    """A sampler that returns the right renders is always right. One that returns the next concept's is never right."""
    runtime, pipeline = drawing
    right = [meter.renders[concept] for _, concept in meter.prompts]
    wrong = [meter.renders[(concept + 1) % len(meter.concepts)] for _, concept in meter.prompts]
    position = iter(range(0, len(right), 20))

    def sample(request: Request) -> tuple[Any, Any]:
        start = next(position)
        assert list(request.prompt) == [text for text, _ in meter.prompts[start : start + 20]]
        return np.stack(wrong[start : start + 20]), np.stack(right[start : start + 20])

    measured = measure_quality(runtime, pipeline, meter, sample)
    assert measured.reference_top1 == pytest.approx(100, abs=0.5)
    assert measured.top1 == pytest.approx(0, abs=0.5)
    assert not measured.passed
    assert measured.image_ssim < 0.9
    assert measured.reconstruction_psnr_db == pytest.approx(measured.reference_reconstruction_psnr_db, abs=0.05)
    assert measured.reconstruction_psnr_db is not None
    assert measured.reconstruction_psnr_db > 20


def test_without_a_meter_only_distances_are_measured(drawing: tuple[SanaRuntime, Any], tmp_path: Path) -> None:
    runtime, pipeline = drawing
    assert Meter.find(tmp_path) is None
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    measured = measure_quality(runtime, pipeline, None, lambda request: (image, image), prompts=("a cat",))
    assert (measured.top1, measured.reconstruction_psnr_db, measured.passed) == (None, None, True)
    assert (measured.image_ssim, measured.image_psnr_db, measured.least_image_psnr_db) == (pytest.approx(1), 100.0, math.inf)
    assert "not measured" in measured.as_text()
    assert json.loads(json.dumps(measured.as_json(), allow_nan=False))["least_image_psnr_db"] == "inf"


def test_a_damaged_meter_is_named(meter: Meter, tmp_path: Path) -> None:
    copy = shutil.copytree(meter.classifier.parent, tmp_path / "quality")
    (copy / "meter.json").write_text("{}")
    with pytest.raises(ArtifactError, match="quality is damaged"):
        Meter.find(tmp_path)


@pytest.mark.parametrize(("ours", "theirs", "passed"), [(90.0, 91.0, True), (90.0, 91.5, False), (93.0, 91.5, False)])
def test_a_bundle_may_differ_from_diffusers_by_one_point(ours: float, theirs: float, passed: bool) -> None:
    assert Quality(200, 40, 30, 1, 1, top1=ours, reference_top1=theirs).passed is passed


def test_ssim() -> None:
    """By its definition, SSIM of flat images is (2 a b + c) / (a^2 + b^2 + c). Noise lowers it."""
    a, b = (np.full((16, 20, 3), level, np.uint8) for level in (100, 120))
    c = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 120 + c) / (100**2 + 120**2 + c))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    slightly, wholly = (image // 2 + 64 + rng.integers(0, size, image.shape).astype(np.uint8) for size in (8, 60))
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image, slightly) > ssim(image, wholly)
