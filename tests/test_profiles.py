import dataclasses
from itertools import product

import pytest

from sana_export.contract import DYNAMIC_AXES
from sana_export.errors import UsageError
from sana_export.manifest import ModelInfo
from sana_export.profiles import DECODER_TILE, PROFILES, Profile, custom_profile, explain_outside, outside, profile_named
from sana_export.resolutions import BINS
from sana_export.runtime.decoding import plan_windows

MODEL = ModelInfo(
    sample_size=32,
    latent_channels=32,
    vae_scale_factor=32,
    timestep_scale=1.0,
    text_channels=2304,
    embedding_rows=256000,
    scheduler={},
    instruction="",
    max_sequence_length=300,
    default_steps=20,
    default_guidance_scale=4.5,
    decoder_tile_halo=7,
    decoder_tile_scale=8,
)


def ranges_of(profile: Profile, sample_size: int = 32, **options: int) -> dict[str, tuple[int, int, int]]:
    model = dataclasses.replace(MODEL, sample_size=sample_size)
    return profile.ranges(model, **{"instruction_tokens": 180, **options})


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("sample_size", [4, 8, 16, 32, 64, 128])
def test_every_profile_has_an_ordered_range_for_every_axis_of_the_contract(name: str, sample_size: int) -> None:
    ranges = ranges_of(PROFILES[name], sample_size)

    assert set(ranges) == set(DYNAMIC_AXES)
    for axis, (lowest, typical, highest) in ranges.items():
        assert 1 <= lowest <= typical <= highest, axis
    native = sample_size * 32
    assert ranges["image_height"][1] == ranges["image_width"][1] == native
    for axis in ("height", "width"):
        assert ranges[f"image_{axis}"] == tuple(32 * length for length in ranges[f"latent_{axis}"])


@pytest.mark.parametrize("sample_size", BINS)
@pytest.mark.parametrize("name", ["laptop", "datacenter", "default"])
def test_every_bin_of_the_variant_fits(name: str, sample_size: int) -> None:
    ranges = ranges_of(PROFILES[name], sample_size)

    for height, width in BINS[sample_size].values():
        request = {
            "image_height": height,
            "image_width": width,
            "latent_height": height // 32,
            "latent_width": width // 32,
            "output_height": height,
            "output_width": width,
            "batch": 1,
            "branches": 3,
            "text_tokens": 300,
        }
        assert explain_outside(ranges, request) is None


def test_bins_of_1024_px_reach_from_512_to_2048_on_each_axis() -> None:
    ranges = ranges_of(PROFILES["laptop"])

    assert ranges["image_height"] == ranges["image_width"] == (512, 1024, 2048)
    assert ranges["latent_height"] == ranges["latent_width"] == (16, 32, 64)
    assert ranges["output_height"] == (32, 1024, 4096)
    assert ranges["batch"] == (1, 1, 1)
    assert ranges_of(PROFILES["datacenter"])["batch"][::2] == (1, 8)


def test_default_reaches_from_128_px_to_the_longest_bin_side() -> None:
    ranges = ranges_of(PROFILES["default"], sample_size=16)

    assert ranges["image_height"] == (128, 512, 1024)
    assert ranges["batch"] == (1, 1, 4)
    assert (ranges["branches"], ranges["text_branches"]) == ((1, 2, 3), (1, 2, 2))


def test_static_varies_only_the_text_and_the_size_of_the_final_image() -> None:
    ranges = ranges_of(PROFILES["static"])

    open_axes = {axis for axis, (lowest, _, highest) in ranges.items() if lowest != highest}
    assert open_axes == {"tokens", "prefix_tokens", "text_tokens", "output_height", "output_width"}
    assert (ranges["image_height"][0], ranges["batch"][0], ranges["branches"][0]) == (1024, 1, 2)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("sample_size", BINS)
def test_every_window_of_a_tiled_decode_fits(name: str, sample_size: int) -> None:
    """The default tile fits every profile, smaller ones fit if the profile has a range."""
    ranges = ranges_of(PROFILES[name], sample_size)
    covered = PROFILES[name].covered(dataclasses.replace(MODEL, sample_size=sample_size))

    for (height, width), tile in product(covered, (256, 512, 1000, DECODER_TILE)):
        if tile < DECODER_TILE and name == "static":
            continue
        for window in plan_windows(height // 8, width // 8, tile // 8, 7):
            rows, columns = len(window.rows.index), len(window.columns.index)
            request = {
                "feature_height": height // 8,
                "feature_width": width // 8,
                "tile_height": rows,
                "tile_width": columns,
                "tile_image_height": 8 * rows,
                "tile_image_width": 8 * columns,
            }
            assert explain_outside(ranges, request) is None


def test_windows_are_bounded_by_the_tile_not_by_the_image() -> None:
    assert ranges_of(PROFILES["laptop"], 128)["tile_height"] == (46, 142, 142)
    assert ranges_of(PROFILES["laptop"], 128)["tile_image_width"] == (368, 1136, 1136)
    assert ranges_of(PROFILES["laptop"], 128)["feature_height"] == (256, 512, 1024)
    assert ranges_of(PROFILES["static"], 16)["tile_height"] == (64, 64, 64)


def test_text_axes_fit_the_longest_prompt_with_and_without_the_stored_prefix() -> None:
    ranges = ranges_of(PROFILES["laptop"], instruction_tokens=180)

    assert ranges["prefix_tokens"] == (1, 180, 180)
    assert ranges["text_tokens"][::2] == (1, 300)
    assert ranges["tokens"][::2] == (1, 480)


@pytest.mark.parametrize("branches", [1, 2])
def test_branches_are_capped_by_what_the_bundle_samples_with(branches: int) -> None:
    for profile in PROFILES.values():
        lowest, typical, highest = ranges_of(profile, branches=branches)["branches"]
        assert 1 <= lowest <= typical <= highest == branches


def test_custom_profile_is_one_size_and_every_batch_up_to_a_limit() -> None:
    ranges = ranges_of(custom_profile(MODEL, height=1152, width=896, batch=4))

    assert ranges["image_height"] == (1152, 1152, 1152)
    assert ranges["latent_width"] == (28, 28, 28)
    assert ranges["batch"] == (1, 4, 4)
    assert ranges_of(custom_profile(MODEL, width=512))["image_height"] == (1024, 1024, 1024)


@pytest.mark.parametrize(("height", "width"), [(1000, 1024), (1024, 33), (0, 1024), (-32, 1024)])
def test_custom_size_that_the_decoder_cannot_make_names_the_nearest_one(height: int, width: int) -> None:
    with pytest.raises(UsageError, match="multiples of 32") as caught:
        custom_profile(MODEL, height=height, width=width)
    assert f"{height}x{width}" in str(caught.value)
    if height == 1000:
        assert caught.value.fix == "--height 992 --width 1024"


def test_custom_batch_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="batch is out of range"):
        custom_profile(MODEL, batch=0)


def test_unknown_profile_lists_the_table_and_the_most_similar_name() -> None:
    with pytest.raises(UsageError) as caught:
        profile_named("labtop")
    assert all(name in str(caught.value) for name in PROFILES)
    assert caught.value.fix == "--profile laptop"
    assert profile_named("static") is PROFILES["static"]


def test_a_request_outside_the_ranges_lists_what_is_possible() -> None:
    ranges = ranges_of(PROFILES["laptop"])
    request = {"image_height": 4096, "image_width": 512, "batch": 2, "branches": 0, "unheard_of": 9}

    assert outside(ranges, request) == {axis: ranges[axis] for axis in ("image_height", "batch", "branches")}
    text = explain_outside(ranges, request)
    assert text is not None
    assert "image_height 4096 (possible: 512 to 2048)" in text
    assert "batch 2 (possible: only 1)" in text
    assert "branches 0 (possible: 1 to 3)" in text
    assert "image_width" not in text


def test_the_limits_themselves_are_inside() -> None:
    ranges = ranges_of(PROFILES["laptop"])

    assert outside(ranges, {axis: values[0] for axis, values in ranges.items()}) == {}
    assert outside(ranges, {axis: values[2] for axis, values in ranges.items()}) == {}
    assert set(outside(ranges, {axis: values[2] + 1 for axis, values in ranges.items()})) == set(ranges)
