"""Bins and resize tables against diffusers' PixArtImageProcessor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

from sana_export.errors import UsageError
from sana_export.resolutions import BINS
from sana_export.runtime.resolution import ResizePlan, check_size, choose_bin, make_resize_plan

TABLES = {16: ASPECT_RATIO_512_BIN, 32: ASPECT_RATIO_1024_BIN, 64: ASPECT_RATIO_2048_BIN, 128: ASPECT_RATIO_4096_BIN}


def apply(plan: ResizePlan, image: np.ndarray) -> np.ndarray:
    """The plan's formula for [B, C, H, W], as the postprocess graph computes it."""
    rows = (image[:, :, plan.row_index] * plan.row_weight[:, :, None]).sum(axis=2)
    return (rows[..., plan.column_index] * plan.column_weight).sum(axis=-2)


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width) * 2 - 1


def assert_equal_to_diffusers(size: tuple[int, int], output: tuple[int, int]) -> None:
    image = random_image(*size)
    theirs = PixArtImageProcessor.resize_and_crop_tensor(image, output[1], output[0]).numpy()
    plan = make_resize_plan(*size, *output)
    assert plan.row_index.dtype == plan.column_index.dtype == np.int64
    assert plan.row_weight.dtype == plan.column_weight.dtype == np.float32
    ours = apply(plan, image.numpy())
    assert ours.shape == theirs.shape == (1, 3, *output)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def covered(size: tuple[int, int], output: tuple[int, int]) -> bool:
    """Whether diffusers scales to at least the size of the output."""
    ratio = max(output[0] / size[0], output[1] / size[1])
    return int(size[0] * ratio) >= output[0] and int(size[1] * ratio) >= output[1]


def test_bins_are_those_of_diffusers_in_their_order() -> None:
    for sample_size, table in TABLES.items():
        theirs = [(float(ratio), (int(height), int(width))) for ratio, (height, width) in table.items()]
        assert list(BINS[sample_size].items()) == theirs


@pytest.mark.parametrize("sample_size", BINS)
def test_a_table_names_each_size_by_its_aspect_ratio_in_ascending_order(sample_size: int) -> None:
    """Also for a table that diffusers lacks. Its ratios are rounded, most of them down."""
    table = BINS[sample_size]
    assert list(table) == sorted(table)
    assert table[1.0] == (32 * sample_size, 32 * sample_size)
    for ratio, (height, width) in table.items():
        assert height % 32 == width % 32 == 0
        assert ratio == pytest.approx(height / width, abs=0.011)


@pytest.mark.parametrize("sample_size", TABLES)
def test_choose_bin_equals_diffusers(sample_size: int) -> None:
    table = TABLES[sample_size]
    random = np.random.default_rng(sample_size).integers(1, 9000, size=(1500, 2)).tolist()
    ties = [(int(1e4 * (a + b) / 2), 10000) for a, b in zip(BINS[sample_size], list(BINS[sample_size])[1:], strict=False)]
    for height, width in [*random, *ties, *((h, w) for h, w in BINS[sample_size].values()), (1, 9000), (9000, 1)]:
        theirs = PixArtImageProcessor.classify_height_width_bin(height, width, ratios=table)
        assert choose_bin(height, width, sample_size) == theirs


def test_sample_size_without_bins() -> None:
    with pytest.raises(UsageError, match=r"(?s)sample_size 8\b.*16, 32, 64, 128.*--no-resolution-binning"):
        choose_bin(256, 256, 8)


@pytest.mark.parametrize(("height", "width"), [(0, 512), (512, -1)])
def test_size_must_be_positive(height: int, width: int) -> None:
    with pytest.raises(UsageError, match="positive"):
        choose_bin(height, width, 32)
    with pytest.raises(UsageError, match="positive"):
        check_size(height, width, 32)
    with pytest.raises(UsageError, match="positive"):
        make_resize_plan(512, 512, height, width)


def test_check_size_names_the_nearest_sizes() -> None:
    check_size(32, 32, 32)
    check_size(1024, 4096, 32)
    with pytest.raises(UsageError, match=r"wanted: for example 992x512 or 1024x512\n"):
        check_size(1000, 512, 32)
    with pytest.raises(UsageError, match=r"wanted: for example 1024x32\n"):
        check_size(1024, 31, 32)
    with pytest.raises(UsageError, match=r"wanted: for example 96x64 or 96x96 or 128x64 or 128x96\n"):
        check_size(100, 90, 32)


def test_check_size_uses_the_factor_of_the_checkpoint() -> None:
    check_size(1008, 16, 16)
    with pytest.raises(UsageError, match=r"multiples of 16 .*\n.*\n.*wanted: for example 992x512 or 1008x512\n"):
        check_size(1000, 512, 16)
    with pytest.raises(UsageError, match=r"multiples of 64 .*\n.*\n.*wanted: for example 960x512 or 1024x512\n"):
        check_size(992, 512, 64)


@pytest.mark.parametrize("seed", range(4))
def test_resize_plan_equals_diffusers_on_any_sizes(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 260, size=(60, 4)).tolist()
    cases = [((h, w), (oh, ow)) for h, w, oh, ow in sizes if covered((h, w), (oh, ow))]
    assert len(cases) > 40
    for size, output in cases:
        assert_equal_to_diffusers(size, output)


@pytest.mark.parametrize("output", [(1000, 1000), (1080, 1920), (1920, 1080), (768, 1000), (512, 512), (1024, 1000)])
@pytest.mark.parametrize("sample_size", [16, 32])
def test_resize_plan_equals_diffusers_on_requests(sample_size: int, output: tuple[int, int]) -> None:
    assert_equal_to_diffusers(choose_bin(*output, sample_size), output)


@pytest.mark.parametrize(("size", "output"), [((96, 64), (96, 64)), ((96, 64), (90, 64)), ((64, 96), (64, 51))])
def test_a_plan_without_a_resize_only_selects_pixels(size: tuple[int, int], output: tuple[int, int]) -> None:
    plan = make_resize_plan(*size, *output)
    for weight in (plan.row_weight, plan.column_weight):
        np.testing.assert_array_equal(weight[0], 1)
        np.testing.assert_array_equal(weight[1], 0)
    image = random_image(*size)
    theirs = PixArtImageProcessor.resize_and_crop_tensor(image, output[1], output[0])
    np.testing.assert_array_equal(apply(plan, image.numpy()), theirs.numpy())


def test_the_output_is_covered_when_diffusers_rounds_below_it() -> None:
    """256x944 is sampled in the bin 512x1856. diffusers scales it to a width of 943 and then crops it to one column."""
    size, output = choose_bin(256, 944, 32), (256, 944)
    assert not covered(size, output)
    image = random_image(*size)
    assert PixArtImageProcessor.resize_and_crop_tensor(image, output[1], output[0]).shape != (1, 3, *output)
    ours = apply(make_resize_plan(*size, *output), image.numpy())
    resized = torch.nn.functional.interpolate(image, size=(260, 944), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(ours, resized[:, :, 2:258].numpy(), rtol=0, atol=1e-6)
