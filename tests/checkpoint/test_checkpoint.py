"""Checkpoints are checked before they are used, and errors name what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.checkpoint.clamp import Clamp
from sana_export.errors import ArtifactError, UsageError
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


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_are_read_completely(folder, tiny_pipeline, tiny_checkpoint, variant):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    tiny_pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB", variant=variant)
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert all((f".{variant}-" in shard.name) == (variant is not None) for shard in shards)
    weights = open_checkpoint(str(folder), weights_variant=variant).weights("transformer")
    wanted = tiny_checkpoint.weights("transformer")
    assert set(weights) == set(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    shards[1].unlink()
    with pytest.raises(ArtifactError, match="is missing 1 of") as caught:
        open_checkpoint(str(folder), weights_variant=variant)
    assert shards[1].name in caught.value.found
    assert shards[0].name in caught.value.wanted


def test_files_of_the_variant_are_preferred(folder, tiny_pipeline):
    tiny_pipeline.vae.save_pretrained(folder / "vae", variant="fp16")
    tiny_pipeline.text_encoder.save_pretrained(folder / "text_encoder", variant="fp16", max_shard_size="300KB")
    checkpoint = open_checkpoint(str(folder), weights_variant="fp16")
    names = {
        component: [path.name for path in checkpoint.weight_files(component)]
        for component in ("transformer", "vae", "text_encoder")
    }
    assert names["transformer"] == ["diffusion_pytorch_model.safetensors"]
    assert names["vae"] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert len(names["text_encoder"]) > 1
    assert all(name.startswith("model.fp16-0000") for name in names["text_encoder"])
    assert [path.name for path in open_checkpoint(str(folder)).weight_files("vae")] == ["diffusion_pytorch_model.safetensors"]


def test_a_checkpoint_with_only_a_variant_names_the_option_for_it(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(ArtifactError, match="no weights") as caught:
        open_checkpoint(str(folder))
    assert caught.value.fix == "--variant bf16"
    assert "diffusion_pytorch_model.bf16.safetensors" in caught.value.found


def test_headers_give_shapes_and_bytes(tiny_checkpoint, tiny_pipeline):
    weights, wanted = tiny_checkpoint.weights("transformer"), tiny_pipeline.transformer.state_dict()
    assert {name: weights.shape(name) for name in weights} == {name: tuple(value.shape) for name, value in wanted.items()}
    assert weights.bytes == sum(value.nbytes for value in wanted.values())


RESIDENT = """
import sys
from pathlib import Path
import psutil, torch
from sana_export.checkpoint.weights import Weights, read_headers

weights, process = Weights(read_headers([Path(sys.argv[1])])), psutil.Process()
weights["t0"].sum()
start = process.memory_info().rss
peak = 0
for name in weights:
    value = weights[name]
    value.sum()
    peak = max(peak, process.memory_info().rss - start)
    del value
print(weights.bytes, peak, process.memory_info().rss - start)
"""


def test_only_one_tensor_at_a_time_is_in_memory(tmp_path):
    size, count = 12_800_000, 40
    path = tmp_path / "large.safetensors"
    save_file({f"t{number}": torch.ones(size // 2, dtype=torch.float16) for number in range(count)}, path)
    ran = subprocess.run([sys.executable, "-c", RESIDENT, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    total, peak, end = map(int, ran.stdout.split())
    assert total == count * size
    assert size <= peak < 2 * size
    assert end < size / 2


def test_the_hash_covers_weights_and_configs(folder, tiny_checkpoint):
    assert open_checkpoint(str(folder)).sha256 == tiny_checkpoint.sha256
    edit_json(folder / "scheduler" / "scheduler_config.json", flow_shift=6.0)
    assert open_checkpoint(str(folder)).sha256 != tiny_checkpoint.sha256


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLPipeline", "SanaVideoPipeline", "SanaImageToVideoPipeline"])
def test_other_pipelines_are_refused(folder, name):
    edit_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(ArtifactError, match=f"not a Sana text-to-image checkpoint\n.*model_index.json names {name}") as caught:
        open_checkpoint(str(folder))
    assert "SanaPipeline" in caught.value.wanted
    assert "sana-export variants" in caught.value.fix


def test_a_controlnet_folder_is_not_a_checkpoint(folder):
    (folder / "model_index.json").unlink()
    (folder / "config.json").write_text(json.dumps({"_class_name": "SanaControlNetModel"}))
    with pytest.raises(ArtifactError, match="not a diffusers checkpoint") as caught:
        open_checkpoint(str(folder))
    assert caught.value.found == "no model_index.json, and a config.json of SanaControlNetModel"


def test_pickled_weights_are_refused(folder):
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        (folder / "transformer" / name).unlink(missing_ok=True)
    (folder / "transformer" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(ArtifactError, match="no weights as safetensors") as caught:
        open_checkpoint(str(folder))
    assert "diffusion_pytorch_model.bin" in caught.value.found
    assert f'diffusers.DiffusionPipeline.from_pretrained("{folder}")' in caught.value.fix
    assert f'pipeline.save_pretrained("{folder.name}-safetensors")' in caught.value.fix


def test_a_folder_of_the_original_code_is_not_a_checkpoint(tmp_path):
    (tmp_path / "Sana_600M.pth").touch()
    with pytest.raises(ArtifactError, match="not a diffusers checkpoint") as caught:
        open_checkpoint(str(tmp_path))
    assert "Sana_600M.pth" in caught.value.found


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("component", "tensor"),
    [
        ("transformer", "transformer_blocks.1.ff.conv_point.weight"),
        ("vae", "decoder.conv_out.weight"),
        ("text_encoder", "layers.1.mlp.down_proj.weight"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype"])
def test_missing_and_wrong_tensors_are_named(folder, tiny_checkpoint, component, tensor, damage):
    shape = list(tiny_checkpoint.weights(component).shape(tensor))

    def change(tensors):
        value = tensors.pop(tensor)
        if damage == "shape":
            tensors[tensor] = value[1:].contiguous()
        elif damage == "dtype":
            tensors[tensor] = value.to(torch.float8_e4m3fn)

    edit_weights(next((folder / component).glob("*.safetensors")), change)
    found, wanted = {
        "missing": (f"no {tensor}", f"{tensor} of shape {shape}"),
        "shape": ([shape[0] - 1, *shape[1:]], shape),
        "dtype": ("F8_E4M3", "F32, F16, BF16"),
    }[damage]
    with pytest.raises(ArtifactError, match=component) as caught:
        open_checkpoint(str(folder))
    assert (caught.value.found, caught.value.wanted) == (found, wanted)
    assert tensor in str(caught.value)


def test_tensors_that_the_network_does_not_have_are_refused(folder):
    name = "transformer_blocks.0.attn1.norm_q.weight"
    edit_weights(
        folder / "transformer" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.update({name: torch.ones(128)})
    )
    with pytest.raises(ArtifactError, match="has 1 tensors that its network does not have") as caught:
        open_checkpoint(str(folder))
    assert caught.value.found == name


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


@pytest.mark.parametrize("name", ["nonsense", "safetensors", "s"])
def test_a_missing_variant_is_reported(folder, name):
    with pytest.raises(UsageError, match=f"no weights of the variant '{name}'") as caught:
        open_checkpoint(str(folder), weights_variant=name)
    assert "diffusion_pytorch_model.safetensors" in caught.value.found


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="tokenizer"):
        open_checkpoint(str(folder))


def test_a_folder_has_no_revision(folder):
    assert open_checkpoint(str(folder), revision="v1").record().revision is None


def test_an_unknown_alias_lists_similar_ones():
    with pytest.raises(UsageError, match=r"sana-1600m-1024px") as caught:
        open_checkpoint("sana-1600m-1024")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["checkpoints/", "~no-such-user/sana", "./sana", "a//b"])
def test_a_folder_that_does_not_exist_is_not_sought_on_the_hub(name):
    with pytest.raises(UsageError, match=f"unknown model '{name}'"):
        open_checkpoint(name)


def test_an_empty_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(ArtifactError, match="not a diffusers checkpoint"):
        open_checkpoint(str(tmp_path))


PUBLISHED = VARIANTS["sana-1600m-1024px"], VARIANTS["sana-1600m-1024px-multiling"], VARIANTS["sana-1600m-1024px-bf16"]


def recognized(folder, monkeypatch, *rows):
    """Make `folder` look like a checkpoint that is not synthetic and has the configs of `rows`."""
    (folder / "sana_export.json").unlink()
    monkeypatch.setattr("sana_export.checkpoint.checkpoint.recognize", lambda transformer, scheduler=None: rows)


@pytest.mark.parametrize(
    ("stored", "clamp", "alias"), [(torch.float16, True, None), (torch.bfloat16, False, "sana-1600m-1024px-bf16")]
)
def test_if_rows_differ_in_the_clamp_the_stored_dtype_decides(folder, monkeypatch, stored, clamp, alias):
    def change(tensors):
        tensors.update({name: value.to(stored) for name, value in tensors.items()})

    edit_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", change)
    recognized(folder, monkeypatch, *PUBLISHED)
    checkpoint = open_checkpoint(str(folder))
    found = checkpoint.trained_with_clamp()
    assert (found.on, found.certain) == (clamp, True)
    assert "stored as" in found.reason
    assert (checkpoint.variant and checkpoint.variant.alias) == alias  # two rows with the clamp fit, so it is neither
    assert checkpoint.defaults_from.clamp is clamp


def test_if_rows_agree_on_the_clamp_it_is_known(folder, monkeypatch):
    recognized(folder, monkeypatch, *PUBLISHED[:2])
    checkpoint = open_checkpoint(str(folder))  # stored as F32
    reason = "the table of variants says so for sana-1600m-1024px and sana-1600m-1024px-multiling"
    assert checkpoint.trained_with_clamp() == Clamp(True, reason)
    assert checkpoint.defaults_from is PUBLISHED[0]


def test_a_synthetic_checkpoint_names_its_row(folder):
    edit_json(folder / "sana_export.json", variant="sana1-5-1-6b-1024px", synthetic=True)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.rows == (VARIANTS["sana1-5-1-6b-1024px"],)
    assert checkpoint.synthetic
    assert checkpoint.record().variant == "sana1-5-1-6b-1024px"


def test_the_table_is_consistent():
    for alias, variant in VARIANTS.items():
        assert alias == variant.alias
        assert [variant.repo is None, variant.recipe is None, not variant.embedded].count(False) == 1
        assert variant.clamp is not (variant.repo is None or any(mark in variant.repo for mark in ("BF16", "SANA1.5", "Sprint")))
