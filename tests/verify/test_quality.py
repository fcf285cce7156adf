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
from sana_export.export.parity import psnr, ssim
from sana_export.quantization.schemes import SCHEMES
from sana_export.runtime import SanaRuntime
from sana_export.runtime.request import Request
from sana_export.verify.drawing import Drawing, sample_both
from sana_export.verify.quality.measure import NOT_FINITE, Reference, measure_quality
from sana_export.verify.quality.meter import Meter
from sana_export.verify.quality.result import DIFFUSERS, NOT_QUANTIZED, Drawn, Likeness, Limits, Quality, Sample, Spread
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


def drawing_of(images: Any, finite: Any = True) -> Drawing:
    """Images uint8 [B, H, W, 3] as something drew them."""
    return Drawing(np.zeros((len(images), 1, 1, 1), np.float32), images, np.full(len(images), finite))


def test_measures_follow_the_images(drawing: tuple[SanaRuntime, Any], meter: Meter) -> None:
    """A sampler that returns the right renders is always right. One that returns the next concept's is never right."""
    runtime, pipeline = drawing
    right = [meter.renders[concept] for _, concept in meter.prompts]
    wrong = [meter.renders[(concept + 1) % len(meter.concepts)] for _, concept in meter.prompts]
    near = [np.clip(image.astype(int) + 1, 0, 255).astype(np.uint8) for image in right]

    def drawn(images: list[Any]) -> Any:
        position = iter(range(0, len(images), 20))

        def draw(request: Request) -> Drawing:
            start = next(position)
            assert list(request.prompt) == [text for text, _ in meter.prompts[start : start + 20]]
            assert request.seed == start // 20
            return drawing_of(np.stack(images[start : start + 20]))

        return draw

    references = [Reference("base", drawn(near)), Reference(DIFFUSERS, drawn(right))]
    measured = measure_quality(runtime, pipeline, meter, drawn(wrong), references)
    base, diffusers = measured.comparisons
    assert (base.top1, diffusers.top1) == (pytest.approx(100, abs=0.5), pytest.approx(100, abs=0.5))
    assert measured.top1 == pytest.approx(0, abs=0.5)
    assert not measured.passed
    assert base.ssim.mean < 0.9
    ratios = [psnr(ours, theirs, peak=255.0) for ours, theirs in zip(wrong, near, strict=True)]
    assert (base.psnr_db.mean, base.psnr_db.worst) == (pytest.approx(np.mean(ratios)), min(ratios))
    assert base.psnr_db.low == sorted(ratios)[9]  # 10 of 200 images are this good or worse
    assert [sample.psnr_db[0] for sample in measured.samples] == ratios
    assert measured.samples[27].prompt == meter.prompts[27][0]
    assert (measured.samples[27].seed, measured.samples[27].place) == (1, 7)
    assert [sample.references_recognized[1] for sample in measured.samples].count(True) >= 199
    assert measured.reconstruction_psnr_db == pytest.approx(measured.reference_reconstruction_psnr_db, abs=0.05)
    assert measured.reconstruction_psnr_db is not None
    assert measured.reconstruction_psnr_db > 20
    document = json.loads(json.dumps(measured.as_json(), allow_nan=False))
    assert (document["against"]["reference"], document["against"]["low_image_psnr_db"]) == ("base", base.psnr_db.low)
    assert (document["reference"], document["image_psnr_db"]) == (DIFFUSERS, diffusers.psnr_db.mean)
    assert document["images"][27]["psnr_db"] == list(measured.samples[27].psnr_db)
    assert "images" not in measured.as_json(samples=False)


def test_without_a_meter_only_distances_are_measured(drawing: tuple[SanaRuntime, Any], tmp_path: Path) -> None:
    runtime, pipeline = drawing
    assert Meter.find(tmp_path) is None
    same = drawing_of(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8))
    references = [Reference(DIFFUSERS, lambda request: same)]
    measured = measure_quality(runtime, pipeline, None, lambda request: same, references, prompts=("a cat",))
    (row,) = measured.comparisons
    assert (measured.top1, measured.reconstruction_psnr_db, measured.passed) == (None, None, True)
    assert (row.ssim.mean, row.psnr_db) == (pytest.approx(1), Spread(100.0, math.inf, math.inf))
    assert "top-1 and reconstruction: not measured" in measured.as_text()
    assert f"over 1 prompts, {runtime.manifest.model.default_steps} steps, fp32 on onnxruntime" in measured.as_text()
    document = json.loads(json.dumps(measured.as_json(), allow_nan=False))
    assert (document["steps"], document["quantize"]) == (runtime.manifest.model.default_steps, {})
    assert (document["least_image_psnr_db"], document["images"][0]["psnr_db"]) == ("inf", ["inf"])


@pytest.mark.parametrize(("finite", "fault"), [(True, "blank"), (False, NOT_FINITE)])
def test_one_bad_image_fails_whatever_the_scheme_and_without_a_meter(
    drawing: tuple[SanaRuntime, Any], finite: bool, fault: str
) -> None:
    runtime, pipeline = drawing
    right = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = right.copy()
    found[1] = 0
    own, theirs = drawing_of(found, [True, finite, True]), drawing_of(right)
    measured = measure_quality(
        runtime,
        pipeline,
        None,
        lambda request: own,
        [Reference(DIFFUSERS, lambda request: theirs)],
        limits=Limits(100.0, 0.0),
        prompts=("a cat", "a dog", "a hen"),
    )
    assert not measured.passed
    assert [(sample.prompt, sample.place) for sample in measured.faults] == [("a dog", 1)]
    assert f"'a dog' (seed 0, image 2): {fault}" in measured.as_text()
    assert "MISSED blank, saturated or not finite: 1 images" in measured.as_text()


def test_a_damaged_meter_is_named(meter: Meter, tmp_path: Path) -> None:
    copy = shutil.copytree(meter.classifier.parent, tmp_path / "quality")
    (copy / "meter.json").write_text("{}")
    with pytest.raises(ArtifactError, match="quality is damaged"):
        Meter.find(tmp_path)


def quality(limits: Limits, psnr_db: float, ours: float, *references: float) -> Quality:
    """One whose images have a mean PSNR of `psnr_db` and a top-1 of `ours`, against references with theirs."""
    spread, image = Spread(psnr_db, 20.0, 10.0), np.zeros((1, 1, 3), np.uint8)
    rows = tuple(Likeness(f"{index}", spread, Spread(1.0, 1.0, 1.0), top1=top1) for index, top1 in enumerate(references))
    sample = Sample("a cat", 0, 0, image, (image,), (10.0,), (1.0,))
    return Quality("b", Drawn(2, "fp32", {}, "onnxruntime"), (sample,), rows, limits, None, ours, 100.0, 20.0, 20.0)


@pytest.mark.parametrize(("ours", "theirs", "passed"), [(90.0, 91.0, True), (90.0, 91.5, False), (93.0, 91.5, False)])
def test_a_bundle_may_differ_from_diffusers_by_one_point(ours: float, theirs: float, passed: bool) -> None:
    assert quality(NOT_QUANTIZED, 1.0, ours, theirs).passed is passed


@pytest.mark.parametrize(
    ("schemes", "psnr_db", "ours", "references", "passed"),
    [
        (["int8-weight"], 30.0, 99.0, [100.0, 98.5], True),
        (["int8-weight"], 29.9, 99.0, [99.0, 99.0], False),
        (["int8-weight"], 50.0, 98.9, [99.0, 100.0], False),  # the limits count for every reference
        (["int8-weight"], 50.0, 98.9, [100.0, 99.0], False),
        (["int4-weight"], 25.0, 97.0, [100.0, 99.0], True),
        (["int4-weight"], 50.0, 96.9, [100.0, 99.0], False),
        (["int8-weight", "int4-weight"], 25.0, 97.0, [100.0], True),  # the widest limits of the parts
        (["int8-weight", "int4-weight"], 24.9, 97.0, [100.0], False),
    ],
)
def test_a_scheme_has_limits(schemes: list[str], psnr_db: float, ours: float, references: list[float], passed: bool) -> None:
    measured = quality(Limits.of(schemes), psnr_db, ours, *references)
    assert measured.passed is passed
    assert ("MISSED" in measured.as_text()) is not passed


def test_every_scheme_meets_what_its_bits_promise() -> None:
    for scheme in SCHEMES.values():
        limits = Limits.of([scheme.name])
        assert limits.top1_points <= (1.0 if scheme.bits == 8 else 3.0), scheme
        assert limits.psnr_db is not None
        assert limits.psnr_db >= (30.0 if scheme.bits == 8 else 20.0), scheme


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
