"""A ControlNet for a checkpoint: where it may be, which names its tensors may have, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.commands import model_words
from sana_export.controlnets import CONTROLNETS
from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.manifest import Options
from sana_export.verify.reference import load_reference

ALIAS = "tiny-random-controlnet"
STEM = "diffusion_pytorch_model.safetensors"
QUANTIZED = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


@pytest.fixture(scope="module")
def known(own_cache: None) -> SanaCheckpoint:
    return open_checkpoint("tiny-random", controlnet=ALIAS)


@pytest.fixture(scope="module")
def weights(known: SanaCheckpoint) -> dict[str, Tensor]:
    return {name: known.weights("controlnet")[name].clone() for name in known.weights("controlnet")}


@pytest.fixture
def folder(known: SanaCheckpoint, tmp_path: Path) -> Path:
    """The ControlNet's folder without the marker of a synthetic one."""
    assert known.controlnet is not None
    return shutil.copytree(known.controlnet.path, tmp_path / "control", ignore=shutil.ignore_patterns("sana_export.json"))


def original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of the original code: its names, with fused tensors, and the base transformer that the file also contains.

    Written from the class SanaMSControlNet of NVlabs/Sana, not from the table that is tested.
    """
    tensors: dict[str, Tensor] = {}
    for number in range(2):
        block, ours = f"controlnet.{number}.copied_block.", f"transformer_blocks.{number}."
        fused = {"attn.qkv.weight": [f"attn1.to_{part}.weight" for part in "qkv"]}
        fused |= {f"cross_attn.kv_linear.{kind}": [f"attn2.to_{part}.{kind}" for part in "kv"] for kind in ("weight", "bias")}
        plain = {
            "scale_shift_table": "scale_shift_table",
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.depth_conv.conv": "ff.conv_depth",
            "mlp.point_conv.conv": "ff.conv_point",
        }
        tensors |= {block + name: torch.cat([weights[ours + part] for part in parts]) for name, parts in fused.items()}
        tensors |= _renamed(weights, {ours + theirs: block + name for name, theirs in plain.items()})
        tensors |= _renamed(weights, {f"controlnet_blocks.{number}": f"controlnet.{number}.after_proj"})
        tensors[f"blocks.{number}.attn.qkv.weight"] = torch.randn(6, 2)
    tops = {
        "patch_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "caption_norm": "attention_y_norm",
        "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.linear": "t_block.1",
        "input_block": "controlnet.0.before_proj",
    }
    return (
        tensors
        | _renamed(weights, tops)
        | {"y_embedder.y_embedding": torch.randn(3, 4), "final_layer.linear.weight": torch.ones(2)}
    )


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {
        name.replace(theirs, ours): value
        for name, value in weights.items()
        for theirs, ours in names.items()
        if name == theirs or re.fullmatch(re.escape(theirs) + r"\.(weight|bias)", name)
    }


def pth(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": original(weights), "epoch": 3, "step": torch.tensor(7)}, folder / "hed.pth")
    return folder / "hed.pth"


def old_pth(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(original(weights), folder / "hed.pt", _use_new_zipfile_serialization=False)
    return folder / "hed.pt"


def original_safetensors(folder: Path, weights: dict[str, Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in original(weights).items()}, folder / "hed.safetensors")
    return folder / "hed.safetensors"


def wrapped(folder: Path, weights: dict[str, Tensor]) -> Path:
    save_file({f"module.{name}": value for name, value in weights.items()}, folder / "wrapped.safetensors")
    return folder / "wrapped.safetensors"


def pipeline_folder(folder: Path, weights: dict[str, Tensor]) -> Path:
    shutil.copytree(folder, folder.parent / "pipeline" / "controlnet")
    return folder.parent / "pipeline"


def sharded(folder: Path, weights: dict[str, Tensor]) -> Path:
    SanaControlNetModel.from_pretrained(folder).save_pretrained(folder.parent / "shards", max_shard_size="500KB")
    assert len(list((folder.parent / "shards").glob("*.safetensors"))) > 1
    return folder.parent / "shards"


@pytest.mark.parametrize(
    "place",
    [
        lambda folder, _: folder,
        lambda folder, _: folder / STEM,
        pipeline_folder,
        sharded,
        pth,
        old_pth,
        original_safetensors,
        wrapped,
    ],
    ids=["folder", "its file", "pipeline", "shards", "pth", "old pth", "original names", "wrapped"],
)
def test_every_origin_gives_the_same_network(
    known: SanaCheckpoint, folder: Path, weights: dict[str, Tensor], place: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    path = place(folder, weights)
    found = open_checkpoint("tiny-random", controlnet=str(path))
    read = found.weights("controlnet")
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert found.config("controlnet") == known.config("controlnet")
    assert found.controlnet is not None
    assert not found.controlnet.synthetic
    record = found.record()
    assert record.controlnet is not None
    assert record.controlnet.path == str(path)
    assert model_words(record)[-2:] == ["--controlnet", str(path)]
    assert found.sha256 != open_checkpoint("tiny-random").sha256


def test_a_pipeline_with_a_controlnet_brings_its_own(known: SanaCheckpoint, folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(known.folder, tmp_path / "model", ignore=shutil.ignore_patterns("sana_export.json"))
    shutil.copytree(folder, model / "controlnet")
    index = json.loads((model / "model_index.json").read_text())
    named = {"_class_name": "SanaControlNetPipeline", "controlnet": ["diffusers", "SanaControlNetModel"]}
    (model / "model_index.json").write_text(json.dumps({**index, **named}))
    found = open_checkpoint(str(model))
    assert found.controlnet is not None
    assert found.controlnet.path == model / "controlnet"
    assert len(found.weights("controlnet")) == len(known.weights("controlnet"))
    assert type(load_reference(found, Options("fp32", clamp=False), pag=False).controlnet).__name__ == "SanaControlNetModel"
    other = open_checkpoint(str(model), controlnet=ALIAS)
    assert other.controlnet is not None
    assert other.controlnet.source == ALIAS
    shutil.rmtree(model / "controlnet")
    assert "has no ControlNet" in refused(None, str(model)).message


def test_published_ones_have_the_configs_of_the_converter() -> None:
    """model_kwargs of diffusers' scripts/convert_sana_controlnet_to_diffusers.py."""
    for alias, heads, cross in (("controlnet-hed-1600m", 70, (20, 112)), ("controlnet-hed-600m", 36, (16, 72))):
        config = CONTROLNETS[alias].config
        network = SanaControlNetModel.from_config({**config, "num_layers": 1}, attention_head_dim=32)
        assert (config["num_layers"], config["num_attention_heads"], config["attention_head_dim"]) == (7, heads, 32)
        assert (config["num_cross_attention_heads"], config["cross_attention_head_dim"]) == cross
        assert config["cross_attention_dim"] == heads * 32
        assert (config["caption_channels"], config["sample_size"], config["interpolation_scale"]) == (2304, 32, None)
        assert network.config.in_channels == 32


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 0",)


def refused(name: str | None, model: str = "tiny-random") -> SanaExportError:
    with pytest.raises((UsageError, ArtifactError)) as caught:
        open_checkpoint(model, controlnet=name)
    return caught.value


def test_a_pickle_with_code_is_refused_before_it_runs(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"state_dict": original(weights), "hook": Code()}, folder / "evil.pth")
    error = refused(str(folder / "evil.pth"))
    assert "loading it could run code" in error.message
    assert "system" in str(error.found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: {"blocks.0.x": torch.ones(2)}, "has no weights that are read"),
        (lambda whole: {**whole, "t_block.1.weight": torch.zeros(1).expand(9000, 9000)}, "claims more numbers than it has"),
        (
            lambda whole: {**whole, "t_block.1.weight": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)},
            "cannot be weights",
        ),
        (lambda whole: {**whole, "t_block.1.weight": torch.ones(4, 4).to_sparse()}, "cannot be weights"),
        (lambda whole: {**whole, "t_block.1.weight": torch.ones(4, dtype=torch.complex64)}, "cannot be weights"),
        (lambda whole: {**whole, "controlnet.0.copied_block.attn.qkv.weight": torch.tensor(1.0)}, "has the wrong shape"),
        (lambda whole: {**whole, "controlnet.0.copied_block.attn.qkv.weight": torch.ones(385, 128)}, "has the wrong shape"),
        (lambda whole: {"x_embedder.proj.weight": torch.ones(4, 4, 1, 1)}, "has no ControlNet"),
        (lambda whole: [torch.ones(2)], "has no weights"),
    ],
    ids=["other", "repeated", "quantized", "sparse", "complex", "no axis", "odd rows", "no blocks", "list"],
)
def test_pickles_of_another_content(folder: Path, weights: dict[str, Tensor], content: Any, message: str) -> None:
    torch.save(content(original(weights)), folder / "other.pth")
    assert message in refused(str(folder / "other.pth")).message


def test_tied_tensors_and_a_damaged_conversion(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANA_EXPORT_CACHE", str(tmp_path / "cache"))
    tensors = original(weights)
    tensors["t_embedder.mlp.2.bias"] = tensors["t_embedder.mlp.0.bias"]
    torch.save({"state_dict": tensors}, folder / "hed.pth")
    for _ in range(2):
        read = open_checkpoint("tiny-random", controlnet=str(folder / "hed.pth")).weights("controlnet")
        assert torch.equal(*(read[f"time_embed.emb.timestep_embedder.linear_{number}.bias"] for number in (1, 2)))
        (converted,) = (tmp_path / "cache" / "converted").glob("*.safetensors")
        converted.write_bytes(b"rubbish")


def test_the_root_of_a_pipeline_may_have_another_config(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pipeline" / "controlnet")
    (tmp_path / "pipeline" / "config.json").write_text(json.dumps({"_class_name": "SanaTransformer2DModel"}))
    found = open_checkpoint("tiny-random", controlnet=str(tmp_path / "pipeline"))
    assert found.controlnet is not None
    assert found.controlnet.path == tmp_path / "pipeline" / "controlnet"


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02}q\x00."], ids=["empty", "text", "a dict"])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    error = refused(str(tmp_path / "broken.pth"))
    assert "broken.pth" in error.message


def test_a_truncated_pickle(folder: Path, weights: dict[str, Tensor]) -> None:
    path = pth(folder, weights)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "damaged or truncated" in refused(str(path)).message or "is not" in refused(str(path)).message


def test_other_networks_are_named(known: SanaCheckpoint, folder: Path) -> None:
    error = refused("mid-controlnet")
    assert error.message == "the ControlNet mid-controlnet does not fit the transformer of tiny-random"
    assert "num_attention_heads 18" in str(error.found)
    assert error.fix == f"--controlnet {ALIAS}"
    assert "SANA-Sprint" in refused(ALIAS, "tiny-sprint").message
    assert "not a ControlNet of Sana" in refused(str(known.folder / "transformer")).message
    assert "unknown ControlNet" in refused("no-such-thing").message
    empty = folder.parent / "empty"
    empty.mkdir()
    assert "has no ControlNet" in refused(str(empty)).message
    shutil.copy(folder / STEM, empty / "hed.safetensors")
    assert str(empty / "hed.safetensors") in str(refused(str(empty)).fix)


def test_all_problems_of_its_weights_and_config(folder: Path) -> None:
    tensors = load_file(folder / STEM)
    tensors["extra"] = torch.zeros(2)
    del tensors["input_block.bias"]
    save_file(tensors, folder / STEM)
    assert "input_block.bias" in str(refused(str(folder)).found)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "patch_size": 2, "attention_bias": True}))
    error = refused(str(folder))
    assert "for 2 reasons" in error.message
    assert "patch_size" in str(error.found)
    assert "attention_bias" in str(error.found)
