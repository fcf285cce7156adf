"""A transformer in one file gives the same tensors, with the names of diffusers and of the original code."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.checkpoint.single_file import open_single_file
from sana_export.errors import ArtifactError, UsageError
from sana_export.manifest import Options
from sana_export.verify.reference import load_reference

#: Names in diffusers and in the original code, written down from NVlabs/Sana's modules.
ORIGINAL = (
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_q", r"blocks.\1.cross_attn.q_linear"),
    (r"transformer_blocks\.(\d+)\.attn1\.norm_([qk])", r"blocks.\1.attn.\2_norm"),
    (r"transformer_blocks\.(\d+)\.attn2\.norm_([qk])", r"blocks.\1.cross_attn.\2_norm"),
    (r"transformer_blocks\.(\d+)\.ff\.conv_inverted", r"blocks.\1.mlp.inverted_conv.conv"),
    (r"transformer_blocks\.(\d+)\.ff\.conv_depth", r"blocks.\1.mlp.depth_conv.conv"),
    (r"transformer_blocks\.(\d+)\.ff\.conv_point", r"blocks.\1.mlp.point_conv.conv"),
    (r"transformer_blocks\.(\d+)\.scale_shift_table", r"blocks.\1.scale_shift_table"),
    (r"patch_embed\.proj", "x_embedder.proj"),
    (r"time_embed\.(?:emb\.)?timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_embed\.(?:emb\.)?timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_embed\.guidance_embedder\.linear_1", "cfg_embedder.mlp.0"),
    (r"time_embed\.guidance_embedder\.linear_2", "cfg_embedder.mlp.2"),
    (r"time_embed\.linear", "t_block.1"),
    (r"caption_projection\.linear_([12])", r"y_embedder.y_proj.fc\1"),
    (r"caption_norm", "attention_y_norm"),
    (r"proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
)


def original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as the original code stores them: q, k and v in one tensor, and tensors that only it has."""
    tensors, found = dict(tensors), {}
    for block in sorted({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}):
        own = f"transformer_blocks.{block}."
        found[f"blocks.{block}.attn.qkv.weight"] = torch.cat([tensors.pop(f"{own}attn1.to_{x}.weight") for x in "qkv"])
        for part in ("weight", "bias"):
            found[f"blocks.{block}.cross_attn.kv_linear.{part}"] = torch.cat(
                [tensors.pop(f"{own}attn2.to_{x}.{part}") for x in "kv"]
            )
    for name, value in tensors.items():
        (renamed,) = {re.sub(pattern, to, name) for pattern, to in ORIGINAL if re.search(pattern, name)}
        found[renamed] = value
    return {**found, "pos_embed": torch.zeros(1, 4, 8), "y_embedder.y_embedding": torch.zeros(300, 8)}


def drawn(config: dict, seed: int = 3) -> dict[str, torch.Tensor]:
    """New weights for a transformer of `config`, with no two equal tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in SanaTransformer2DModel.from_config(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("rows", [None, 0, 1, 2])
def test_a_damaged_file_of_the_original_code_is_the_users(tiny_checkpoint, tmp_path, rows):
    whole = original(drawn(tiny_checkpoint.config("transformer")))
    stub = {"x_embedder.proj.weight": torch.ones(4, 4)} if rows is None else {name: torch.ones(rows, 2) for name in whole}
    save_file(stub, tmp_path / "transformer.safetensors")
    with pytest.raises(ArtifactError, match="transformer") as caught:
        open_single_file(tmp_path / "transformer.safetensors")
    assert caught.value.fix == "download the file again"


@pytest.mark.parametrize(
    "kind", [{}, {"qk_norm": "rms_norm_across_heads"}, {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}]
)
@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "_orig_mod.", "diffusion_model.", "module._orig_mod.", "transformer.", "model."]
)
@pytest.mark.parametrize("names", [dict, original])
def test_both_kinds_of_names_give_the_same_tensors(tiny_checkpoint, tmp_path, kind, prefix, names):
    wanted = drawn({**tiny_checkpoint.config("transformer"), **kind})
    file = tmp_path / "transformer.safetensors"
    save_file({prefix + name: value for name, value in names(wanted).items()}, file)
    weights = open_single_file(file)
    assert set(weights) == set(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert {name: weights.shape(name) for name in weights} == {name: tuple(value.shape) for name, value in wanted.items()}
    assert weights.bytes == sum(value.nbytes for value in wanted.values())


def test_compiled_blocks_and_all_in_one_files_give_the_same_tensors(tiny_checkpoint, tmp_path):
    wanted = drawn(tiny_checkpoint.config("transformer"))
    file = tmp_path / "transformer.safetensors"
    compiled = {re.sub(r"^(transformer_blocks\.\d+\.)", r"\1_orig_mod.", name): value for name, value in wanted.items()}
    others = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "text_encoders.gemma2.embed": torch.zeros(1)}
    whole = {f"model.diffusion_model.{name}": value for name, value in wanted.items()} | others
    for tensors in (compiled, whole):
        save_file(tensors, file)
        weights = open_single_file(file)
        assert set(weights) == set(wanted)
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_two_tensors_of_one_name_are_refused(tiny_checkpoint, tmp_path):
    file = tmp_path / "transformer.safetensors"
    save_file({"proj_out.weight": torch.zeros(1), "_orig_mod.proj_out.weight": torch.zeros(1)}, file)
    with pytest.raises(ArtifactError, match="two tensors of one name") as caught:
        open_single_file(file)
    assert "_orig_mod.proj_out.weight" in caught.value.found


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("transformer_blocks.0.attn1.to_q.weight.absmax",), "4-bit weights of bitsandbytes"),
        (("transformer_blocks.0.attn1.to_q.weight.quant_state.bitsandbytes__nf4",), "4-bit weights of bitsandbytes"),
        (("transformer_blocks.0.attn1.to_q.SCB",), "8-bit weights of bitsandbytes"),
        (("transformer_blocks.0.attn1.to_q.qweight", "transformer_blocks.0.attn1.to_q.wscales"), "nunchaku (SVDQuant)"),
        (("transformer_blocks.0.attn1.to_q.qweight", "transformer_blocks.0.attn1.to_q.qzeros"), "GPTQ or AWQ"),
        (("scaled_fp8", "model.diffusion_model.blocks.0.attn.qkv.scale_weight"), "scaled 8-bit weights (fp8)"),
        (("transformer_blocks.0.attn1.to_q.weight_scale",), "scaled 8-bit weights (fp8)"),
        (("transformer_blocks.0.attn1.to_q.weight:_data",), "torchao"),
        (("transformer_blocks.0.attn1.to_q.weight._data",), "optimum-quanto"),
    ],
)
def test_quantized_weights_are_called_what_they_are(tiny_checkpoint, tmp_path, names, what):
    file = tmp_path / "transformer.safetensors"
    for prefix in ("", "_orig_mod."):
        tensors = {prefix + name: torch.zeros(4, 1, dtype=torch.uint8) for name in names}
        save_file({**tensors, f"{prefix}transformer_blocks.0.attn1.to_q.weight": torch.zeros(4, 1, dtype=torch.uint8)}, file)
        with pytest.raises(ArtifactError, match="which are not supported") as caught:
            open_checkpoint(str(tiny_checkpoint.folder), transformer=file)
        assert what in caught.value.message
        assert str(file) in caught.value.message
        assert str(caught.value.found).removeprefix(prefix) in [name.removeprefix("model.diffusion_model.") for name in names]


def test_8_bit_floats_are_named(tiny_checkpoint, tmp_path):
    file = tmp_path / "transformer.safetensors"
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in drawn(tiny_checkpoint.config("transformer")).items()}, file)
    with pytest.raises(ArtifactError, match="unsupported dtype") as caught:
        open_checkpoint(str(tiny_checkpoint.folder), transformer=file)
    assert caught.value.found == "F8_E4M3"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a U-Net of Stable Diffusion"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("decoder.up_blocks.0.0.conv1.weight", "a VAE"),
        ("model.layers.0.self_attn.q_proj.weight", "Gemma or Llama"),
        ("transformer_blocks.0.ff.net.0.proj.weight", "PixArt"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "CLIP"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "--lora"),
        ("lycoris_transformer_blocks_0_attn1_to_q.lokr_w1", "--lora"),
        ("transformer.transformer_blocks.0.attn1.to_q.hada_w1_a", "--lora"),
    ],
)
def test_weights_of_another_network_are_called_what_they_are(tiny_checkpoint, tmp_path, name, what):
    file = tmp_path / "transformer.safetensors"
    save_file({name: torch.zeros(2, 2)}, file)
    with pytest.raises(ArtifactError, match=r"is missing (\d+) of \1 tensors") as caught:
        open_checkpoint(str(tiny_checkpoint.folder), transformer=file)
    assert what in str(caught.value)
    assert str(caught.value.found).split(", but ")[1].split(":")[0] in name


@pytest.mark.parametrize("names", [dict, original])
def test_it_replaces_the_checkpoints_own_transformer(tiny_checkpoint, tmp_path, names):
    wanted = drawn(tiny_checkpoint.config("transformer"))
    file = tmp_path / "transformer.safetensors"
    save_file(names(wanted), file)
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), transformer=file)
    weights = checkpoint.weights("transformer")
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert checkpoint.sha256 != tiny_checkpoint.sha256
    assert checkpoint.record().transformer.path == str(file)
    own = SanaTransformer2DModel.from_single_file(str(file), config=str(tiny_checkpoint.folder), subfolder="transformer")
    reference = load_reference(checkpoint, Options("fp32", False), pag=False).transformer
    for name, value in reference.state_dict().items():
        assert torch.equal(value, wanted[name])
        assert torch.equal(value, own.state_dict()[name])


def test_the_checkpoint_needs_no_transformer_of_its_own(tiny_checkpoint, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_checkpoint.folder, tmp_path / "base")
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.rename(tmp_path / "mine.safetensors")
    checkpoint = open_checkpoint(str(folder), transformer=tmp_path / "mine.safetensors")
    assert len(checkpoint.weights("transformer")) == len(tiny_checkpoint.weights("transformer"))


def test_what_does_not_fit_is_named(tiny_checkpoint, tmp_path):
    config, file = tiny_checkpoint.config("transformer"), tmp_path / "transformer.safetensors"
    wide = drawn({**config, "num_cross_attention_heads": 2 * config["num_cross_attention_heads"]})
    deep = drawn({**config, "num_layers": config["num_layers"] + 1})
    shallow = original(drawn(config))
    del shallow["blocks.1.attn.proj.bias"]
    shape = list(drawn(config)["transformer_blocks.0.attn2.to_q.weight"].shape)
    cases = (
        (wide, "transformer_blocks.0.attn2.to_q.weight", str([2 * shape[0], shape[1]]), str(shape)),
        (deep, "tensors that its network does not have", f"transformer_blocks.{config['num_layers']}.", None),
        (shallow, "is missing a tensor", "no blocks.1.attn.proj.bias", None),
        ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, "is missing", "no scale_shift_table", None),
    )
    for tensors, message, found, wanted in cases:
        save_file(tensors, file)
        with pytest.raises(ArtifactError, match=message) as caught:
            open_checkpoint(str(tiny_checkpoint.folder), transformer=file)
        assert str(caught.value.found).startswith(found)
        assert wanted is None or str(caught.value.wanted) == wanted
        assert str(file) in str(caught.value)


def test_damaged_and_foreign_files_are_refused(tiny_checkpoint, tmp_path):
    file = tmp_path / "transformer.safetensors"
    with pytest.raises(UsageError, match=r"transformer file .* does not exist"):
        open_checkpoint(str(tiny_checkpoint.folder), transformer=file)
    save_file(drawn(tiny_checkpoint.config("transformer")), file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        open_checkpoint(str(tiny_checkpoint.folder), transformer=file)
    pickle = tmp_path / "transformer.pth"
    pickle.touch()
    with pytest.raises(ArtifactError, match="not a safetensors file") as caught:
        open_checkpoint(str(tiny_checkpoint.folder), transformer=pickle)
    assert ".pth" in caught.value.found


def test_renaming_reads_only_the_headers_of_an_original_file(tiny_checkpoint, tmp_path, monkeypatch):
    """Reading values fails in this test."""
    file = tmp_path / "transformer.safetensors"
    wanted = drawn(tiny_checkpoint.config("transformer"))
    save_file(original(wanted), file)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    monkeypatch.setattr("sana_export.checkpoint.weights.Stored.read", lambda self: pytest.fail(f"{self.name} was read"))
    weights = open_single_file(file)
    monkeypatch.undo()
    assert "blocks.0.attn.qkv.weight" in header
    assert torch.equal(weights["transformer_blocks.0.attn1.to_k.weight"], wanted["transformer_blocks.0.attn1.to_k.weight"])
    assert load_file(file).keys() == header.keys() - {"__metadata__"}
