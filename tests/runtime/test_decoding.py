"""Decoding in tiles gives the same image as in one piece, and loads only the graphs that it needs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sana_export.errors import ArtifactError, UsageError
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.decoding import Span, assemble, plan_windows
from sana_export.runtime.plan import choose_tile

#: The rounding difference between two orders of float32 summation, relative to the largest value of the image.
ROUNDING = 1e-5


def spread(features: Any, scale: int, reach: int) -> Any:
    """A convolution in place of the decoder, [H, W] to [1, 1, scale H, scale W]: sums over the features up to `reach` away."""
    padded = np.pad(features, reach)
    side = range(2 * reach + 1)
    sums = sum(padded[y : y + features.shape[0], x : x + features.shape[1]] for y in side for x in side)
    return sums.repeat(scale, 0).repeat(scale, 1)[None, None]


@pytest.mark.parametrize("seed", range(40))
def test_windows_cover_every_feature_once_with_the_halo_around_it(seed: int) -> None:
    draw = np.random.default_rng(seed)
    height, width, tile = (int(draw.integers(1, 40)) for _ in range(3))
    halo, scale = int(draw.integers(0, 9)), int(draw.integers(1, 4))
    windows = plan_windows(height, width, tile, halo)
    shape = min(height, tile + 2 * halo), min(width, tile + 2 * halo)
    assert {(len(window.rows.index), len(window.columns.index)) for window in windows} == {shape}
    covered = np.zeros((height, width), int)
    for window in windows:
        covered[window.rows.target(1), window.columns.target(1)] += 1
        for span, side in ((window.rows, height), (window.columns, width)):
            assert span.start == 0 or span.first - span.start >= halo
            assert span.stop == side or span.stop - span.last >= halo
    assert (covered == 1).all()

    features = draw.integers(-1000, 1000, (height, width))
    wanted = spread(features, scale, halo)

    def tiled(planned_halo: int) -> Any:
        image = np.zeros(wanted.shape, np.float32)
        planned = plan_windows(height, width, tile, planned_halo)
        return assemble(lambda rows, columns: spread(features[np.ix_(rows, columns)], scale, halo), planned, image, scale)

    np.testing.assert_array_equal(tiled(halo), wanted)
    if halo and max(height, width) > tile + 2 * halo:
        assert (tiled(halo - 1) != wanted).any()


def test_no_more_windows_than_needed() -> None:
    """Windows at the sides of the image need no halo there, so their used part is longer."""
    assert [window.columns for window in plan_windows(1, 34, 8, 3)] == [
        Span(0, 14, 0, 11),
        Span(8, 22, 11, 19),
        Span(16, 30, 19, 27),
        Span(20, 34, 27, 34),
    ]
    assert len(plan_windows(14, 14, 8, 3)) == 1
    assert len(plan_windows(22, 22, 8, 3)) == 4


@pytest.mark.parametrize(
    ("requested", "height", "width", "tile"),
    [(None, 2048, 2048, 0), (None, 1024, 4096, 0), (None, 2080, 2048, 1024), (0, 4096, 4096, 0), (64, 32, 32, 64)],
)
def test_only_large_images_are_decoded_in_tiles_by_default(requested: int | None, height: int, width: int, tile: int) -> None:
    assert choose_tile(requested, height, width) == tile


def decode(runtime: SanaRuntime, latents: Any, tile: int | None) -> Any:
    """The image of `latents` before it is clipped to [0, 1]: float32 [B, 3, H, W]."""
    batch, _, height, width = latents.shape
    request = Request(["a"] * batch, height=32 * height, width=32 * width, use_resolution_binning=False, decoder_tile=tile)
    plan = runtime.plan(request)
    return np.array(runtime.backend.to_host(runtime.decode_raw(plan, latents)))


def random_latents(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("tile", [8, 72, 128, 160, 1024])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 256, 256), (2, 160, 352), (1, 416, 96), (3, 32, 32)])
def test_tiled_equals_untiled(tiny_runtime: SanaRuntime, batch: int, height: int, width: int, tile: int) -> None:
    latents = random_latents(batch, 32, height // 32, width // 32)
    wanted, found = decode(tiny_runtime, latents, 0), decode(tiny_runtime, latents, tile)
    assert found.shape == wanted.shape == (batch, 3, height, width)
    assert np.abs(found - wanted).max() < ROUNDING * np.abs(wanted).max()


@pytest.fixture
def with_halo(tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that changes the halo in the runtime's manifest by this many features."""

    def change(by: int) -> None:
        manifest = tiny_runtime.manifest
        model = dataclasses.replace(manifest.model, decoder_tile_halo=manifest.model.decoder_tile_halo + by)
        monkeypatch.setattr(tiny_runtime.backend, "manifest", dataclasses.replace(manifest, model=model))

    return change


def test_the_halo_of_the_manifest_is_tight(tiny_runtime: SanaRuntime, with_halo: Callable[[int], None]) -> None:
    latents = random_latents(1, 32, 8, 8)
    wanted = decode(tiny_runtime, latents, 0)
    with_halo(-1)
    assert np.abs(decode(tiny_runtime, latents, 64) - wanted).max() > 10 * ROUNDING * np.abs(wanted).max()


def test_tiled_images_after_binning(tiny_runtime: SanaRuntime) -> None:
    options: dict[str, Any] = {"height": 300, "width": 200, "num_inference_steps": 1, "seed": 1}
    whole, tiled = (tiny_runtime("a fox", decoder_tile=tile, **options).images[0] for tile in (0, 96))
    assert tiled.size == (200, 300)
    # A value on the edge between two levels may round the other way.
    assert np.abs(np.asarray(whole, int) - np.asarray(tiled, int)).max() <= 1
    assert (np.asarray(whole) != np.asarray(tiled)).mean() < 1e-3


@pytest.mark.parametrize(
    ("tile", "output_type", "loaded"),
    [
        (0, "pil", {"vae_decoder"}),
        (None, "np", {"vae_decoder"}),
        (64, "pil", {"vae_decoder_head", "vae_decoder_tail"}),
        (64, "latent", set()),
    ],
)
def test_only_the_decoder_that_is_used_is_loaded(tiny_bundle: Any, tile: int | None, output_type: str, loaded: set[str]) -> None:
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")
    first = set(runtime.sessions)
    assert first == {"text_encoder", "context", "denoiser", "sampler", "postprocess"}
    runtime(
        "x", height=96, width=64, use_resolution_binning=False, num_inference_steps=1, decoder_tile=tile, output_type=output_type
    )
    assert set(runtime.sessions) - first == loaded


@pytest.mark.parametrize(
    ("tile", "parts"),
    [
        (-8, ["decoder_tile is out of range", "from 0 to 16384"]),
        (12, ["12 pixels", "a multiple of 8", "--decoder-tile 8"]),
        (1030, ["--decoder-tile 1024"]),
        (4, ["--decoder-tile 8"]),
        (64.0, ["decoder_tile is not an integer"]),
        ("big", ["decoder_tile is not an integer"]),
    ],
)
def test_invalid_tiles_are_refused(tiny_runtime: SanaRuntime, tile: Any, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        tiny_runtime("fox", decoder_tile=tile)
    for part in parts:
        assert part in str(caught.value)


def remove_tiling_graphs(runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = {name: graph for name, graph in runtime.manifest.graphs.items() if not name.startswith("vae_decoder_")}
    monkeypatch.setattr(runtime, "manifest", dataclasses.replace(runtime.manifest, graphs=graphs))


@pytest.mark.parametrize("options", [{"decoder_tile": 64, "height": 64, "width": 64}, {"height": 4096, "width": 2048}])
def test_without_head_and_tail_the_error_names_the_export_command(
    tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    remove_tiling_graphs(tiny_runtime, monkeypatch)
    with pytest.raises(ArtifactError, match="in tiles") as caught:
        tiny_runtime.plan(Request("fox", use_resolution_binning=False, **options))
    assert "no vae_decoder_head, vae_decoder_tail" in str(caught.value)
    assert "--decoder-tile 0" in str(caught.value)
    assert caught.value.fix is not None
    assert caught.value.fix.startswith(f"sana-export export tiny-random -o {tiny_runtime.bundle}")
    for possible in ({"decoder_tile": 0}, {"output_type": "latent"}):
        tiny_runtime.plan(Request("fox", use_resolution_binning=False, **{**options, **possible}))


def test_a_bundle_without_head_and_tail_decodes_in_one_piece(tiny_bundle: Any, tmp_path: Any) -> None:
    from sana_export.manifest import Manifest

    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    manifest = Manifest.load(bundle)
    graphs = {name: graph for name, graph in manifest.graphs.items() if not name.startswith("vae_decoder_")}
    dataclasses.replace(manifest, graphs=graphs).save(bundle)
    runtime = SanaRuntime.from_pretrained(bundle, backend="onnxruntime")
    assert runtime("x", height=64, width=64, use_resolution_binning=False, num_inference_steps=1).images[0].size == (64, 64)


def test_a_damaged_graph_is_reported_before_sampling(tiny_bundle: Any, tmp_path: Any) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    runtime = SanaRuntime.from_pretrained(bundle, backend="onnxruntime")
    damaged = runtime.manifest.graphs["vae_decoder_tail"].onnx.path
    (bundle / damaged).write_bytes(b"")
    steps: list[int] = []
    with pytest.raises(ArtifactError, match=f"{damaged} is not the file of") as caught:
        runtime("x", decoder_tile=64, callback_on_step_end=lambda runtime, step, *_: steps.append(step))
    assert steps == []
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("sana-export export tiny-random")


def test_a_tile_with_nan_is_an_artifact_error(tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, feeds: Any) -> dict[str, Any]:
            return {"image": np.full((1, 3, 8 * len(feeds["row_index"]), 8 * len(feeds["column_index"])), np.nan, np.float32)}

    monkeypatch.setitem(tiny_runtime.sessions, "vae_decoder_tail", Broken())
    with pytest.raises(ArtifactError, match="an image with NaN"):
        tiny_runtime("x", height=64, width=64, use_resolution_binning=False, num_inference_steps=1, seed=0, decoder_tile=8)
