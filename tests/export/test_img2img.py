"""The graphs for image-to-image: exported on request, for encoders of any supported config, in half precision, as engines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.commands import export_command
from sana_export.contract import GRAPH_GROUPS, GRAPHS
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.bundle import export_bundle, export_key
from sana_export.export.evaluator import RangeMeter, StorageEvaluator
from sana_export.export.graph_files import export_graphs
from sana_export.export.options import choose_graphs, choose_options
from sana_export.export.parity import psnr
from sana_export.formats.arrays import Array
from sana_export.graphs.numerics import FP16_MAX
from sana_export.manifest import Manifest, Options
from sana_export.profiles import static_profile
from sana_export.runtime.decoding import assemble, plan_windows
from sana_export.trt.bundle import build_bundle
from tests.support.heat import heat_encoder
from tests.support.vae import build_vae

ENCODER = ["vae_encoder", "vae_encoder_head", "vae_encoder_tail"]
#: Another number of stages, other downsampling, and attention in all but the first two stages.
OTHER = {
    "encoder_block_types": ("ResBlock",) * 2 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (16, 32, 32, 32, 64),
    "encoder_layers_per_block": (0, 1, 2, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,), (5,), (3,)),
    "downsample_block_type": "pixel_unshuffle",
    "decoder_block_types": "ResBlock",
    "decoder_block_out_channels": (32, 32, 64, 64, 128),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}


def checkpoint_with(vae: Any, folder: Path) -> SanaCheckpoint:
    """`tiny-random` with this autoencoder. The stride of the latents does not matter to an export of the encoder alone."""
    vae.save_pretrained(folder)
    opened = open_checkpoint("tiny-random", vae=str(folder)) if vae.spatial_compression_ratio == 32 else None
    if opened is not None:
        return opened
    base = open_checkpoint("tiny-random")
    copy = shutil.copytree(base.folder, folder.with_name("checkpoint"))
    shutil.rmtree(copy / "vae")
    shutil.copytree(folder, copy / "vae")
    return open_checkpoint(str(copy))


@pytest.mark.parametrize("config", [{"downsample_block_type": "pixel_unshuffle"}, OTHER], ids=["shuffled pixels", "five stages"])
@torch.no_grad()
def test_half_precision_is_safe_with_a_hot_encoder(config: dict[str, Any], tmp_path: Path) -> None:
    """The stream exceeds 65504 in every stage. The exported graphs, with intermediates stored in fp16, stay in range."""
    vae = build_vae(config)
    heat_encoder(vae.encoder)
    checkpoint = checkpoint_with(vae, tmp_path / "hot")
    graphs = export_graphs("vae_encoder", ENCODER, checkpoint, Options("fp16", clamp=False), tmp_path)
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 512)).astype(np.float32)
    streams: list[float] = []
    for stage in filter(len, vae.encoder.down_blocks):
        stage.register_forward_hook(lambda module, inputs, output: streams.append(output.abs().max().item()))
    wanted = (vae.encode(torch.from_numpy(image)).latent * vae.config.scaling_factor).numpy()
    assert min(streams) > FP16_MAX
    paths = {name: tmp_path / entry.onnx.path for name, entry in graphs.items()}
    whole = StorageEvaluator(paths["vae_encoder"]).run({"image": image})["latents"]
    head, tail = StorageEvaluator(paths["vae_encoder_head"]), StorageEvaluator(paths["vae_encoder_tail"])
    stage = 3 if len(vae.encoder.down_blocks) == 6 else 2
    scale, halo = 2**stage, 5

    def render(rows: Any, columns: Any) -> Array:
        window = image[:, :, rows[0] * scale : (rows[-1] + 1) * scale, columns[0] * scale : (columns[-1] + 1) * scale]
        return head.run({"window": window})["window_features"]

    channels = graphs["vae_encoder_head"].spec.outputs[0].shape[1]
    features = np.empty((1, int(channels), 32 // scale, 512 // scale), np.float32)
    assemble(render, plan_windows(32 // scale, 512 // scale, 8, halo), features, 1)
    tiled = tail.run({"features": features})["latents"]
    for found in (whole, tiled):
        assert psnr(found, wanted) >= 40.0
    meter = RangeMeter(paths["vae_encoder"])
    meter.run({"image": image[..., :160]})
    assert meter.ranges()[0].headroom > 2.0


def test_groups_of_graphs(tiny_checkpoint: SanaCheckpoint) -> None:
    def chosen(*names: str) -> list[str]:
        return choose_graphs(names, tiny_checkpoint)

    both = {*GRAPH_GROUPS["default"], *GRAPH_GROUPS["img2img"]}
    assert chosen() == chosen("default") == [*GRAPH_GROUPS["default"]]
    assert chosen("img2img", "default") == [name for name in GRAPHS if name in both]
    assert chosen("default", "vae_encoder") == [*GRAPH_GROUPS["default"], "vae_encoder"]
    assert chosen("sampler") == ["sampler"]
    with pytest.raises(UsageError, match="unknown graph") as caught:
        chosen("default", "vae_encode")
    assert caught.value.found == "vae_encode"
    assert "img2img: vae_encoder, vae_encoder_head" in str(caught.value.wanted)
    options = choose_options(tiny_checkpoint, "fp32", (), None)
    keys = [export_key(tiny_checkpoint, options, chosen(*names)) for names in ([], ["default"], ["default", "img2img"])]
    assert keys[0] == keys[1] != keys[2]


def test_a_bundle_for_text_has_nothing_of_it(tiny_bundle: Path, img2img_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    assert set(manifest.graphs) == set(GRAPH_GROUPS["default"])
    assert not (tiny_bundle / "onnx" / "vae_encoder").exists()
    assert "--graphs" not in export_command(tiny_bundle, manifest)
    command = "sana-export export tiny-random -o {} --dtype fp32 --pag-layers transformer_blocks.1 --graphs default,img2img"
    assert export_command(tiny_bundle, manifest, groups=["img2img"]) == command.format(tiny_bundle)
    assert export_command(img2img_bundle, Manifest.load(img2img_bundle)) == command.format(img2img_bundle)


def test_an_unsupported_encoder_matters_only_to_its_graphs(tmp_path: Path) -> None:
    vae = build_vae({})
    config = {**vae.config, "encoder_layers_per_block": [1, 1, 0, 1, 1, 1]}
    checkpoint = checkpoint_with(AutoencoderDC.from_config(config), tmp_path / "vae")
    export_bundle(checkpoint, tmp_path / "b", graphs=["sampler"])
    with pytest.raises(ArtifactError, match="unsupported encoder_layers_per_block") as caught:
        export_bundle(checkpoint, tmp_path / "b", graphs=["default", "img2img"])
    assert "at least 1 except in the first and the last stage" in str(caught.value.wanted)
    assert [*Manifest.load(tmp_path / "b").graphs] == ["sampler"]


def test_an_autoencoder_without_an_encoder_is_refused_only_for_its_graphs(tmp_path: Path) -> None:
    vae = build_vae({})
    vae.save_pretrained(tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    save_file({name: value for name, value in load_file(file).items() if name.startswith("decoder.")}, file)
    checkpoint = open_checkpoint("tiny-random", vae=str(tmp_path / "vae"))
    export_bundle(checkpoint, tmp_path / "b", graphs=["sampler"])
    with pytest.raises(ArtifactError, match="missing") as caught:
        export_bundle(checkpoint, tmp_path / "b", graphs=["img2img"])
    assert "encoder." in f"{caught.value.message} {caught.value.found}"


def test_tensorrt_rtx_compiles_it(img2img_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = shutil.copytree(img2img_bundle, tmp_path / "bundle")
    built = build_bundle(folder, backend="tensorrt-rtx", profile=static_profile(128, 96), graphs=["img2img"])
    ranges = {engine.graph: engine.ranges for engine in built.engines}
    assert tuple(ranges) == GRAPH_GROUPS["img2img"]
    assert ranges["vae_encoder"] == {"batch": (1, 1, 1), "image_height": (128,) * 3, "image_width": (96,) * 3}
    assert ranges["vae_encoder_head"]["window_image_height"] == (128,) * 3
    assert ranges["vae_encoder_tail"]["encoded_width"] == (12,) * 3
