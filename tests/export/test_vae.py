"""A bundle with the decoder of DC-AE-Lite: against diffusers, in tiles, in half precision, exported again, and as engines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.cli.bundle_text import bundle_origin
from sana_export.commands import export_command
from sana_export.errors import UsageError
from sana_export.export.bundle import export_bundle
from sana_export.export.evaluator import RangeMeter, StorageEvaluator
from sana_export.export.graph_files import export_graphs
from sana_export.export.parity import psnr, relative_error
from sana_export.formats.arrays import Array
from sana_export.graphs.numerics import FP16_MAX
from sana_export.manifest import Manifest, Options
from sana_export.profiles import static_profile
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.decoding import assemble, plan_windows
from sana_export.trt.bundle import build_bundle
from sana_export.verify.bundle import Sampling, verify_bundle
from tests.support.bundles import exported
from tests.support.heat import heat_decoder

ROUNDING = 1e-5
DECODER = ["vae_decoder", "vae_decoder_head", "vae_decoder_tail"]


@pytest.fixture(scope="module")
def lite(own_cache: None) -> SanaCheckpoint:
    return open_checkpoint("tiny-random", vae="tiny-dc-ae-lite")


@pytest.fixture(scope="module")
def lite_bundle(lite: SanaCheckpoint, build_cache: Path) -> Path:
    """The float32 bundle of `tiny-random` with the decoder of DC-AE-Lite."""
    return exported(lite, build_cache / "tiny-lite-fp32")


@pytest.fixture(scope="module")
def runtime(lite_bundle: Path) -> Any:
    with SanaRuntime.from_pretrained(lite_bundle, backend="onnxruntime") as opened:
        yield opened


def latents(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def test_verify_compares_with_the_same_autoencoder(
    lite_bundle: Path, lite: SanaCheckpoint, tiny_checkpoint: SanaCheckpoint
) -> None:
    report = verify_bundle(lite_bundle, lite, Sampling(prompts=["a red fox"], height=96, width=64, steps=2))
    assert report.passed, report.as_text()
    assert {row.name for row in report.graphs} >= set(DECODER)
    with pytest.raises(UsageError, match="was not exported from tiny-random") as caught:
        verify_bundle(lite_bundle, tiny_checkpoint)
    assert "tiny-random --vae tiny-dc-ae-lite" in str(caught.value.wanted)
    assert caught.value.fix == f"sana-export verify {lite_bundle} --reference tiny-random --vae tiny-dc-ae-lite"


@torch.no_grad()
def test_the_whole_decoder_is_one_tail(runtime: SanaRuntime, lite: SanaCheckpoint) -> None:
    model = runtime.manifest.model
    assert (model.decoder_tile_scale, model.vae_scale_factor) == (32, 32)
    assert model.decoder_tile_halo == 6  # by hand: 1, then 3 -> 3, 5 -> 4, 6 -> 4, 6 -> 4, and 2 convolutions more
    assert lite.vae is not None


@pytest.mark.parametrize("tile", [32, 96, 1024])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 512, 384), (2, 96, 416), (1, 32, 32)])
@torch.no_grad()
def test_tiles_from_the_latents_on_equal_diffusers(
    runtime: SanaRuntime, lite: SanaCheckpoint, batch: int, height: int, width: int, tile: int
) -> None:
    given = latents(batch, 32, height // 32, width // 32)
    request = Request(["a"] * batch, height=height, width=width, use_resolution_binning=False, decoder_tile=tile)
    found = np.array(runtime.backend.to_host(runtime.decode_raw(runtime.plan(request), given)))
    assert lite.vae is not None
    vae = AutoencoderDC.from_pretrained(lite.vae.folder)
    wanted = vae.decode(torch.from_numpy(given) / vae.config.scaling_factor).sample.numpy()
    assert np.abs(found - wanted).max() < ROUNDING * np.abs(wanted).max()


def test_the_same_export_is_kept_and_another_autoencoder_replaces_it(lite_bundle: Path, lite: SanaCheckpoint) -> None:
    manifest = Manifest.load(lite_bundle)
    assert export_bundle(lite, lite_bundle, precision="fp32") == manifest
    assert "autoencoder tiny-dc-ae-lite" in bundle_origin(manifest)
    command = export_command(lite_bundle, manifest)
    assert command == f"sana-export export tiny-random -o {lite_bundle} --vae tiny-dc-ae-lite --dtype fp32"


def test_the_torch_backend_opens_the_autoencoder_of_the_bundle(runtime: SanaRuntime, lite_bundle: Path) -> None:
    options: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 1, "seed": 3, "use_resolution_binning": False}
    wanted = np.asarray(runtime("a fox", **options).images[0], int)
    with SanaRuntime.from_pretrained(lite_bundle, backend="torch") as other:
        assert np.abs(np.asarray(other("a fox", **options).images[0], int) - wanted).max() <= 1


@torch.no_grad()
def test_half_precision_is_safe_with_a_hot_decoder(lite: SanaCheckpoint, tmp_path: Path) -> None:
    """The stream exceeds 65504 in every stage. The exported graphs, with intermediates stored in fp16, stay in range."""
    assert lite.vae is not None
    vae = AutoencoderDC.from_pretrained(lite.vae.folder)
    heat_decoder(vae.decoder)
    vae.save_pretrained(tmp_path / "hot")
    hot = open_checkpoint("tiny-random", vae=str(tmp_path / "hot"))
    graphs = export_graphs("vae_decoder", DECODER, hot, Options("fp16", clamp=False), tmp_path)
    given = latents(1, 32, 16, 1)
    streams: list[float] = []
    for stage in filter(len, vae.decoder.up_blocks):
        stage.register_forward_hook(lambda module, inputs, output: streams.append(output.abs().max().item()))
    wanted = vae.decode(torch.from_numpy(given) / vae.config.scaling_factor).sample.numpy()
    assert min(streams) > FP16_MAX

    paths = {name: tmp_path / entry.onnx.path for name, entry in graphs.items()}
    whole = StorageEvaluator(paths["vae_decoder"]).run({"latents": given})["image"]
    head, tail = StorageEvaluator(paths["vae_decoder_head"]), StorageEvaluator(paths["vae_decoder_tail"])
    features = head.run({"latents": given})["features"]

    def render(rows: Any, columns: Any) -> Any:
        return tail.run({"features": features, "row_index": rows, "column_index": columns})["image"]

    tiled = assemble(render, plan_windows(16, 1, 1, 6), np.empty_like(whole), 32)
    for found in (whole, tiled):
        assert psnr(found, wanted) >= 40.0
        assert relative_error(found, wanted) <= 1e-2
    meter = RangeMeter(paths["vae_decoder"])
    meter.run({"latents": given[:, :, :5]})
    assert meter.ranges()[0].headroom > 2.0


def test_tensorrt_rtx_compiles_it(lite_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = shutil.copytree(lite_bundle, tmp_path / "bundle")
    built = build_bundle(folder, backend="tensorrt-rtx", profile=static_profile(128, 96), graphs=DECODER)
    ranges = {engine.graph: engine.ranges for engine in built.engines}
    assert set(ranges) == set(DECODER)
    assert ranges["vae_decoder_head"]["latent_height"] == (4, 4, 4)
    # The profile's tiles, 1024 px and six features on each side, are larger than the image.
    assert (ranges["vae_decoder_tail"]["tile_height"], ranges["vae_decoder_tail"]["feature_width"]) == ((4, 4, 4), (3, 3, 3))
