"""Checkpoints are checked before anything is made of them; what is wrong is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.graphs.checkpoint import open_checkpoint
from sana_export.variants import VARIANTS


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint.folder, tmp_path / "checkpoint")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def test_weights_are_what_diffusers_loads(tiny_checkpoint, tiny_pipeline):
    for component in ("transformer", "vae", "text_encoder"):
        weights, wanted = tiny_checkpoint.weights(component), getattr(tiny_pipeline, component).state_dict()
        assert set(weights) == set(wanted)
        assert all(torch.equal(weights[name], wanted[name]) for name in weights)


def test_sharded_weights_are_read_whole(folder, tiny_pipeline, tiny_checkpoint):
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    tiny_pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    weights, wanted = open_checkpoint(str(folder)).weights("transformer"), tiny_checkpoint.weights("transformer")
    assert set(weights) == set(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    next((folder / "transformer").glob("*-00002-*")).unlink()
    with pytest.raises(ArtifactError, match="lacks 1 of"):
        open_checkpoint(str(folder))


def test_the_hash_sees_weights_and_configs(folder, tiny_checkpoint):
    assert open_checkpoint(str(folder)).sha256 == tiny_checkpoint.sha256
    edit_json(folder / "scheduler" / "scheduler_config.json", flow_shift=6.0)
    assert open_checkpoint(str(folder)).sha256 != tiny_checkpoint.sha256


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLPipeline", "SanaVideoPipeline"])
def test_other_pipelines_are_refused(folder, name):
    edit_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(ArtifactError, match=name):
        open_checkpoint(str(folder))


def test_another_component_class_is_refused(folder):
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(ArtifactError, match="AutoencoderKL"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["no folder", "no weights", "truncated weights", "no config", "damaged config"])
def test_damage_is_named(folder, component, damage):
    weights = next((folder / component).glob("*.safetensors"))
    config = folder / component / "config.json"
    if damage == "no folder":
        shutil.rmtree(folder / component)
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text("{")
    with pytest.raises(ArtifactError, match=component):
        open_checkpoint(str(folder))


def test_a_variant_that_is_not_there_is_said(folder):
    with pytest.raises(UsageError, match="nonsense") as caught:
        open_checkpoint(str(folder), weights_variant="nonsense")
    assert "diffusion_pytorch_model.safetensors" in caught.value.found


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="tokenizer"):
        open_checkpoint(str(folder))


def test_an_unknown_alias_lists_the_near_ones():
    with pytest.raises(UsageError, match=r"sana-1600m-1024px") as caught:
        open_checkpoint("sana-1600m-1024")
    assert caught.value.exit_code == 2


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ArtifactError, match="not a diffusers checkpoint"):
        open_checkpoint(str(tmp_path))


def test_an_unreachable_hub_is_said(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(DependencyError, match="could not be downloaded") as caught:
        open_checkpoint("nobody/has-this-model")
    assert caught.value.exit_code == 3


def test_the_table_is_sound():
    for alias, variant in VARIANTS.items():
        assert alias == variant.alias
        assert (variant.repo is None) != (variant.recipe is None)
        assert variant.clamp is not (variant.repo is None or any(mark in variant.repo for mark in ("BF16", "SANA1.5", "Sprint")))
