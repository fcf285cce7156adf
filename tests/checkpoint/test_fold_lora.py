"""A folded LoRA gives what diffusers and PEFT compute with it, and one that does not fit is refused with the tensor's name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from sana_export.adapters import Lora, parse_lora, read_lora
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.manifest import Options
from sana_export.verify.reference import load_reference
from tests.support.lora_files import SPELLINGS, diffusers_lora, load_transformer, peft_lora, refusals, respelled, write


@pytest.fixture
def transformer(tiny_checkpoint: SanaCheckpoint) -> Any:
    return load_transformer(tiny_checkpoint)


def output(transformer: Any) -> torch.Tensor:
    """The transformer's noise prediction [1, C, h, w] of one fresh input in float32."""
    generator = torch.Generator().manual_seed(7)
    config = transformer.config
    with torch.no_grad():
        return transformer(
            torch.randn(1, config.in_channels, 6, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, config.caption_channels, generator=generator),
            timestep=torch.tensor([500.0]),
        ).sample


def folded(tiny_checkpoint: SanaCheckpoint, *loras: Lora) -> Any:
    """diffusers' transformer with our folded weights."""
    weights = open_checkpoint(str(tiny_checkpoint.folder), loras=loras).weights("transformer")
    model = SanaTransformer2DModel.from_config(tiny_checkpoint.config("transformer"))
    model.load_state_dict({name: weights[name] for name in weights})
    return model


def assert_same(found: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor) -> None:
    """Both are equal up to rounding, and the adapter changes the result."""
    assert (wanted - plain).abs().max() > 0.05 * wanted.abs().max()
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("scale", [0.7, -0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 7, "use_rslora": True},
        {"r": 4, "lora_alpha": 7, "rank_pattern": {"to_q": 2, "conv_point": 6}, "alpha_pattern": {"to_v": 3, r"attn2\.to_q": 5}},
    ],
    ids=["plain", "alpha", "rslora", "patterns"],
)
def test_folding_equals_peft(tiny_checkpoint, transformer, tmp_path, options, scale):
    plain = output(transformer)
    folder = peft_lora(transformer, tmp_path / "lora", **options)
    assert len(load_file(folder / "adapter_model.safetensors")) > 30
    pipeline = load_reference(tiny_checkpoint, Options("fp32", False), pag=False)
    from peft import PeftModel

    wanted_model = PeftModel.from_pretrained(pipeline.transformer, str(folder))
    for module in wanted_model.modules():
        if hasattr(module, "scaling"):
            module.scale_layer(scale)
    assert_same(output(folded(tiny_checkpoint, Lora(folder, scale))), output(wanted_model.base_model.model), plain)


@pytest.mark.parametrize("kind", ["metadata", "no metadata", "a file", "lora.down and up"])
def test_folding_equals_diffusers(tiny_checkpoint, transformer, tmp_path, kind):
    plain = output(transformer)
    alpha = 7 if kind == "metadata" else 4
    folder = diffusers_lora(transformer, tmp_path / "lora", metadata=kind == "metadata", r=4, lora_alpha=alpha)
    path = folder / "pytorch_lora_weights.safetensors"
    if kind == "lora.down and up":
        renamed = {
            name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for name, value in load_file(path).items()
        }
        save_file(renamed, path)
    pipeline = load_reference(tiny_checkpoint, Options("fp32", False), pag=False)
    pipeline.load_lora_weights(str(folder), adapter_name="style")
    pipeline.set_adapters("style", 0.7)
    assert_same(
        output(folded(tiny_checkpoint, Lora(path if kind == "a file" else folder, 0.7))), output(pipeline.transformer), plain
    )


def test_alpha_tensors_are_read(tiny_checkpoint, transformer, tmp_path):
    folder = diffusers_lora(transformer, tmp_path / "lora", metadata=False, r=4)
    path, name = folder / "pytorch_lora_weights.safetensors", "transformer.transformer_blocks.0.attn1.to_q"
    save_file({**load_file(path), f"{name}.alpha": torch.tensor(6.0)}, path)
    tensors = load_file(path)
    up, down = tensors[f"{name}.lora_B.weight"].double(), tensors[f"{name}.lora_A.weight"].double()
    base = tiny_checkpoint.weights("transformer")["transformer_blocks.0.attn1.to_q.weight"]
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(path, 0.7)])
    found = checkpoint.weights("transformer")["transformer_blocks.0.attn1.to_q.weight"]
    assert torch.allclose(found.double(), base.double() + 0.7 * 6 / 4 * up @ down, atol=1e-6)
    reference = load_reference(checkpoint, Options("fp32", False), pag=False).transformer
    assert torch.allclose(reference.transformer_blocks[0].attn1.to_q.weight, found, atol=1e-6)


@pytest.mark.parametrize(("spelling", "alpha"), [*((spelling, 7.0) for spelling in SPELLINGS), ("ComfyUI", None), ("kohya", None)])
def test_the_same_lora_by_any_program_is_the_same(tiny_checkpoint, transformer, tmp_path, spelling, alpha):
    """Bit by bit the weights of the file that diffusers wrote, which another test compares with diffusers."""
    folder = diffusers_lora(transformer, tmp_path / "lora", metadata=False, r=4)
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    save_file(respelled(tensors, "diffusers", alpha), tmp_path / "wanted.safetensors")
    save_file(respelled(tensors, spelling, alpha), tmp_path / "found.safetensors")
    wanted, found = (
        open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(tmp_path / f"{name}.safetensors", 0.7)]).weights("transformer")
        for name in ("wanted", "found")
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = [name for name in wanted if not torch.equal(wanted[name], tiny_checkpoint.weights("transformer")[name])]
    assert len(changed) == len(tensors) / 2


@pytest.mark.parametrize(
    ("spelling", "alpha"), [("diffusers", None), ("diffusers", 7.0), ("kohya", 7.0), ("OneTrainer, dots", 7.0), ("compiled", None)]
)
def test_the_reference_has_the_lora_of_any_program(tiny_checkpoint, transformer, tmp_path, spelling, alpha):
    """`verify` compares with weights that PEFT merged."""
    folder = diffusers_lora(transformer, tmp_path / "lora", metadata=False, r=4)
    path = tmp_path / "style.safetensors"
    save_file(respelled(load_file(folder / "pytorch_lora_weights.safetensors"), spelling, alpha), path)
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(path, 0.7)])
    weights = checkpoint.weights("transformer")
    reference = load_reference(checkpoint, Options("fp32", False), pag=False).transformer.state_dict()
    plain = tiny_checkpoint.weights("transformer")
    changed = [name for name in weights if not torch.equal(weights[name], plain[name])]
    assert len(changed) > 30
    for name in weights:
        assert torch.allclose(reference[name], weights[name], atol=2e-6), name


@pytest.mark.parametrize("spelling", ["diffusers, older", "bare"])
def test_diffusers_reads_these_files_as_we_do(tiny_checkpoint, transformer, tmp_path, spelling):
    folder = diffusers_lora(transformer, tmp_path / "lora", metadata=False, r=4)
    tensors = respelled(load_file(folder / "pytorch_lora_weights.safetensors"), spelling)
    save_file(tensors, tmp_path / "style.safetensors")
    theirs = load_transformer(tiny_checkpoint)
    theirs.load_lora_adapter(tensors, prefix=None if spelling == "bare" else "transformer", adapter_name="style")
    theirs.fuse_lora(lora_scale=0.7, adapter_names=["style"])
    theirs.unload_lora()
    ours = folded(tiny_checkpoint, Lora(tmp_path / "style.safetensors", 0.7))
    for name, value in theirs.state_dict().items():
        assert torch.allclose(value, ours.state_dict()[name], atol=2e-6), name


@pytest.mark.parametrize("config", [True, False])
def test_names_of_peft_in_any_file(tiny_checkpoint, transformer, tmp_path, config):
    folder = peft_lora(transformer, tmp_path / "lora", r=4, lora_alpha=7)
    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(folder)]).weights("transformer")
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "style.safetensors"
    save_file(
        {name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): tensors[name] for name in tensors}, path
    )
    if config:
        path.with_name("adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    else:
        layers = {name.rsplit(".lora_", 1)[0] for name in tensors}
        save_file({**load_file(path), **{f"{layer}.alpha": torch.tensor([[7.0]]) for layer in layers}}, path)
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(path)])
    found = checkpoint.weights("transformer")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    reference = load_reference(checkpoint, Options("fp32", False), pag=False).transformer.state_dict()
    assert all(torch.allclose(reference[name], wanted[name], atol=2e-6) for name in wanted)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_may_have_any_shape_with_one_value(tiny_checkpoint, tmp_path, shape):
    layer, width = "transformer_blocks.0.attn1.to_q", 128
    up, down = torch.randn(width, 4), torch.randn(4, width)
    tensors = {f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down, f"{layer}.alpha": torch.full(shape, 6.0)}
    save_file(tensors, tmp_path / "style.safetensors")
    base = tiny_checkpoint.weights("transformer")[f"{layer}.weight"]
    found = open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(tmp_path / "style.safetensors")]).weights("transformer")
    wanted = base.double() + 6 / 4 * up.double() @ down.double()
    assert torch.allclose(found[f"{layer}.weight"].double(), wanted, atol=1e-5)
    (fold,) = read_lora(Lora(tmp_path / "style.safetensors"), {layer: tuple(base.shape)}).values()
    assert torch.equal(base + torch.from_numpy(fold.product()), found[f"{layer}.weight"])


def test_matrices_of_a_convolution_may_be_stored_without_its_kernel(tiny_checkpoint, tmp_path):
    layer = "transformer_blocks.0.ff.conv_point"
    out, inner = tiny_checkpoint.weights("transformer").shape(f"{layer}.weight")[:2]
    up, down = torch.randn(out, 2), torch.randn(2, inner)
    found = []
    for kernel in ((), (1, 1)):
        tensors = {f"{layer}.lora_B.weight": up.reshape(out, 2, *kernel), f"{layer}.lora_A.weight": down.reshape(2, inner, *kernel)}
        save_file(tensors, tmp_path / "style.safetensors")
        checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(tmp_path / "style.safetensors")])
        found.append(checkpoint.weights("transformer")[f"{layer}.weight"].clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_by_the_name_of_their_tensor(tiny_checkpoint, tmp_path, dtype, value):
    layer = "transformer_blocks.0.attn1.to_q"
    up = torch.full((128, 2), torch.finfo(dtype).max, dtype=dtype)
    up[77, 1] = value
    tensors = {f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": torch.ones(2, 128)}
    message = refused(tiny_checkpoint, write(tmp_path / "lora", tensors))
    assert all(word in message for word in (f"{layer}.lora_B.weight", "not numbers", "[77, 1]"))


def test_a_product_that_is_not_finite_is_refused(tiny_checkpoint, tmp_path):
    layer = "transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_B.weight": torch.full((128, 2), 3e38), f"{layer}.lora_A.weight": torch.ones(2, 128)}
    save_file(tensors, tmp_path / "style.safetensors")
    weights = open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(tmp_path / "style.safetensors")]).weights("transformer")
    with pytest.raises(ArtifactError, match="leaves the range of float32"):
        weights[f"{layer}.weight"]


def test_several_adapters_add_up_and_the_reference_has_them_too(tiny_checkpoint, transformer, tmp_path):
    plain = output(transformer)
    first = diffusers_lora(transformer, tmp_path / "first", r=4, lora_alpha=6)
    again = load_transformer(tiny_checkpoint)
    second = peft_lora(again, tmp_path / "second", r=2, lora_alpha=3, use_rslora=True)
    loras = Lora(first, 0.7), Lora(second, -0.4)
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=loras)
    for pag in (False, True):
        reference = load_reference(checkpoint, Options("fp32", False, (1,)), pag=pag)
        assert set(reference.transformer.state_dict()) == set(checkpoint.weights("transformer"))
        assert_same(output(folded(tiny_checkpoint, *loras)), output(reference.transformer), plain)


def test_the_hash_and_the_record_cover_files_and_scales(tiny_checkpoint, transformer, tmp_path):
    folder = peft_lora(transformer, tmp_path / "lora", r=4)
    hashes = {tiny_checkpoint.sha256}
    for lora in (Lora(folder), Lora(folder, 0.5)):
        checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=[lora])
        hashes.add(checkpoint.sha256)
        assert [(one.path, one.scale) for one in checkpoint.record().loras] == [(str(folder), lora.scale)]
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 9}))
    hashes.add(open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(folder)]).sha256)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a/b.safetensors", "a/b.safetensors", 1.0),
        ("a:0.7", "a", 0.7),
        ("a:-1", "a", -1.0),
        ("c:/a", "c:/a", 1.0),
        ("x:y:2", "x:y", 2.0),
    ],
)
def test_a_path_and_a_scale_are_parsed(text, path, scale):
    assert parse_lora(text) == Lora(Path(path), scale)


@pytest.mark.parametrize(("text", "said"), [("a:nan", "out of range"), ("a:inf", "out of range"), (":1", "PATH:SCALE")])
def test_a_scale_that_is_not_finite_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse_lora(text)


@pytest.mark.parametrize("case", refusals(64))
def test_what_does_not_fit_is_named(tiny_checkpoint, tmp_path, case):
    width = tiny_checkpoint.weights("transformer").shape("transformer_blocks.0.attn1.to_q.weight")[1]
    tensors, words = refusals(width)[case]
    message = refused(tiny_checkpoint, write(tmp_path / "lora", tensors))
    assert all(word in message for word in words), message


def refused(tiny_checkpoint: SanaCheckpoint, path: Path, kind: type[SanaExportError] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(path)])
    assert caught.value.found is not None
    assert caught.value.wanted is not None
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("use_qalora", True), ("init_lora_weights", "pissa"), ("peft_type", "IA3"), ("lora_bias", True)]
)
def test_unsupported_kinds_of_adapters_are_named(tiny_checkpoint, transformer, tmp_path, key, value):
    folder = peft_lora(transformer, tmp_path / "lora", r=4)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    assert f"{key} = {value!r}" in refused(tiny_checkpoint, folder)


def test_missing_files_and_pickles_are_refused(tiny_checkpoint, transformer, tmp_path):
    assert "no LoRA" in refused(tiny_checkpoint, tmp_path / "nothing", UsageError)
    assert "hf download owner/name --local-dir name, then" in refused(tiny_checkpoint, Path("owner/name"), UsageError)
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refused(tiny_checkpoint, tmp_path / "empty")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_lora_weights.bin").touch()
    assert "safe_serialization=True" in refused(tiny_checkpoint, tmp_path / "pickle")
    folder = peft_lora(transformer, tmp_path / "lora", r=4)
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json" in refused(tiny_checkpoint, folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: math.floor(path.stat().st_size / 2)])
    assert "truncated" in refused(tiny_checkpoint, path)
