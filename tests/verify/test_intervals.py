"""What an interval costs: the same numbers as the images, the classifier and the counted work give."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sana_export.bench.work.networks import restated_work
from sana_export.errors import UsageError
from sana_export.export.parity import psnr, ssim
from sana_export.runtime import Request, SanaRuntime
from sana_export.synth.recipes import RECIPES
from sana_export.verify.intervals import Intervals, denoiser_layers, measure_intervals

SMALL: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False}
STEPS = 4
HALF = Intervals(guidance_interval=(0.5, 1))


@pytest.fixture
def small(tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> SanaRuntime:
    """The runtime of `tiny-random`, whose native size is 64 px for the meter."""
    model = replace(tiny_runtime.manifest.model, sample_size=2)
    monkeypatch.setattr(tiny_runtime, "manifest", replace(tiny_runtime.manifest, model=model))
    return tiny_runtime


def test_costs_are_those_of_the_images(small: SanaRuntime) -> None:
    """The "classifier" recognizes an image by its mean, and knows one of the two that the interval draws."""
    prompts = ("a red fox", "a blue whale")

    def draw(interval: tuple[float, float]) -> Any:
        images = small([*prompts], seed=0, num_inference_steps=STEPS, guidance_interval=interval, **SMALL).images
        return np.stack([np.asarray(image) for image in images])

    full, found = draw((0, 1)), draw((0.5, 1))
    known = {full[0].sum(), full[1].sum(), found[1].sum()}
    meter: Any = SimpleNamespace(
        prompts=tuple((text, 1) for text in prompts), classify=lambda images: np.array([image.sum() in known for image in images])
    )
    same, half = measure_intervals(small, meter, [Intervals(), HALF], steps=STEPS)
    assert (same.image_psnr_db, same.least_image_psnr_db, same.image_ssim, same.work) == (100.0, np.inf, 1.0, 1.0)
    pairs = list(zip(found, full, strict=True))
    ratios, likeness = [psnr(*pair, peak=255.0) for pair in pairs], [ssim(*pair) for pair in pairs]
    assert (half.image_psnr_db, half.least_image_psnr_db) == (np.mean(ratios), min(ratios))
    assert (half.image_ssim, half.least_image_ssim) == (np.mean(likeness), min(likeness))
    assert min(ratios) < 40
    assert (half.work, half.prompts, half.top1, half.full_top1) == (0.75, 2, 50.0, 100.0)
    assert min(half.seconds, half.full_seconds) > 0
    assert same.as_json()["least_image_psnr_db"] == "inf"
    assert "guidance in 0.5 to 1 of the steps, compared with all steps over 2 prompts" in half.as_text()
    assert "denoiser work 75.0%" in half.as_text()


def test_pag_is_measured_against_pag_in_all_steps(small: SanaRuntime) -> None:
    (cost,) = measure_intervals(
        small, None, [Intervals(pag_interval=(0, 0.5))], pag_scale=2.0, guidance_scale=1.0, prompts=("fox",), steps=STEPS
    )
    full, found = (
        np.asarray(small("fox", seed=0, num_inference_steps=STEPS, guidance_scale=1.0, pag_scale=2.0, **SMALL, **options).images[0])
        for options in ({}, {"pag_interval": (0, 0.5)})
    )
    assert cost.image_psnr_db == pytest.approx(psnr(found, full, peak=255.0))
    assert (cost.top1, cost.full_top1) == (None, None)
    assert "PAG 2 in 0 to 0.5" in cost.as_text()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_interval": (0.25, 0.75)},
        {"pag_scale": 2.0},
        {"pag_scale": 2.0, "pag_interval": (0, 0.5), "guidance_interval": (0.25, 1)},
        {"pag_scale": 2.0, "guidance_scale": 1.0},
    ],
    ids=str,
)
def test_work_is_about_what_is_counted(tiny_runtime: SanaRuntime, options: dict[str, Any]) -> None:
    """The counter sees each product. Beside the layers, only small ones depend on the branches."""
    manifest, recipe = tiny_runtime.manifest, RECIPES["tiny-random"]
    configs = {"transformer": recipe.transformer, "vae": recipe.vae, "text_encoder": recipe.text_encoder}
    graph_work, sizes = (
        restated_work(configs, manifest.options),
        {"batch": 1, "text_tokens": 8, "latent_height": 16, "latent_width": 16},
    )

    def counted(plan: Any) -> int:
        steps = [(part.branches.axes, part.stop - part.first) for part in plan.segments]
        return sum(graph_work("denoiser", sizes | axes).flop * count for axes, count in steps)

    plans = [tiny_runtime.plan(Request("fox", num_inference_steps=STEPS, **wanted)) for wanted in (options, {})]
    found, wanted = (measure(plans[0]) / measure(plans[1]) for measure in (lambda plan: denoiser_layers(plan, manifest), counted))
    assert found == pytest.approx(wanted, rel=0.12)


def test_intervals_that_the_bundle_cannot_sample_are_reported_first(
    tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SanaRuntime, "encode", None)  # nothing is computed
    with pytest.raises(UsageError, match="pag_interval has no effect"):
        measure_intervals(tiny_runtime, None, [Intervals(pag_interval=(0, 0.5))], prompts=("fox",))
    with pytest.raises(UsageError, match="stops before it starts"):
        Intervals(guidance_interval=(0.5, 0.2))
