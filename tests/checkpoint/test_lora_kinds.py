"""Adapters of every kind, folded into weights: what LyCORIS, PEFT and diffusers make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from sana_export.adapters import Lora, lora_at, read_lora
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.errors import UsageError
from sana_export.lora_kinds import folded
from sana_export.verify.overlays import merge_loras
from tests.support.lora_files import TARGETS, diffusers_lora, flat, load_transformer, randomized, write
from tests.support.lora_kinds import KINDS, adapter, applied

#: Files that LyCORIS 4.1.3 wrote, with the weights that its layers computed with, in weights.safetensors.
LYCORIS = Path(__file__).parents[1] / "support" / "lycoris"
LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.conv_inverted")


@pytest.fixture
def transformer(tiny_checkpoint: SanaCheckpoint) -> Any:
    return load_transformer(tiny_checkpoint)


def assert_equal(found: Tensor, wanted: Tensor, base: Tensor) -> None:
    """Equal to 1e-6 of the largest value, and different from the weight without adapters."""
    largest = wanted.abs().max()
    assert (wanted - base).abs().max() > 0.01 * largest
    assert (found.double() - wanted.double()).abs().max() <= 1e-6 * largest


def with_loras(checkpoint: SanaCheckpoint, *loras: Lora) -> dict[str, Tensor]:
    weights = open_checkpoint(str(checkpoint.folder), loras=loras).weights("transformer")
    return {name: weights[name].float() for name in weights}


def reference(checkpoint: SanaCheckpoint, *loras: Lora) -> dict[str, Tensor]:
    """The weights of the transformer that `verify` compares with."""
    transformer = load_transformer(checkpoint)
    merge_loras(transformer, loras)
    weights: dict[str, Tensor] = transformer.state_dict()
    return weights


def assert_same_weights(found: dict[str, Tensor], wanted: dict[str, Tensor], base: dict[str, Tensor], *, changed: int) -> None:
    names = [name for name in base if not torch.equal(wanted[name], base[name])]
    assert len(names) >= changed
    for name in names:
        assert_equal(found[name], wanted[name], base[name])


@pytest.mark.parametrize("kind", sorted(path.stem for path in LYCORIS.iterdir() if path.stem != "weights"))
def test_files_of_lycoris(kind: str) -> None:
    weights = load_file(LYCORIS / "weights.safetensors")
    shapes = {layer: tuple(weights[f"{kind}/{layer}/base"].shape) for layer in LAYERS}
    folds = read_lora(Lora(LYCORIS / f"{kind}.safetensors"), shapes)
    assert folds.keys() == set(LAYERS)
    for layer, fold in folds.items():
        base = weights[f"{kind}/{layer}/base"]
        found = torch.from_numpy(folded(base.flatten(1).numpy(), [fold])).reshape(base.shape)
        assert_equal(found, weights[f"{kind}/{layer}/trained"], base)


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_its_formula(tiny_checkpoint: SanaCheckpoint, tmp_path: Path, kind: str, scale: float) -> None:
    base = {name: value.float() for name, value in tiny_checkpoint.weights("transformer").items()}
    shapes = {layer: base[f"{layer}.weight"].shape for layer in (*LAYERS, "proj_out")}
    tensors = adapter(kind, shapes, seed=11)
    found = with_loras(tiny_checkpoint, Lora(write(tmp_path / "lora", tensors), scale))
    for layer in shapes:
        prefix = f"transformer.{layer}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        weight = base[f"{layer}.weight"]
        assert_equal(found[f"{layer}.weight"], applied(weight, weight, own, scale), weight)


def peft_configs() -> dict[str, Any]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    patterns = {"rank_pattern": {"to_q": 2, "conv_point": 5}, "alpha_pattern": {"to_v": 3, r"attn2\.to_q": 5}}
    return {
        "DoRA": LoraConfig(r=4, lora_alpha=7, use_dora=True, target_modules=list(TARGETS), **patterns),
        "DoRA with rslora": LoraConfig(r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=list(TARGETS)),
        "LoHa": LoHaConfig(r=4, alpha=7, target_modules=list(TARGETS), **patterns),
        "LoHa, effective": LoHaConfig(r=4, alpha=7, target_modules=list(TARGETS), use_effective_conv2d=True),
        "LoKr": LoKrConfig(r=2, alpha=7, target_modules=list(TARGETS), **patterns),
        "LoKr, decomposed": LoKrConfig(r=1, alpha=3, target_modules=list(TARGETS), decompose_both=True, decompose_factor=8),
        "LoKr, whole matrices": LoKrConfig(r=64, alpha=16, target_modules=list(TARGETS), rank_pattern={"to_q": 32}),
    }


@pytest.mark.parametrize(
    "kind", ["DoRA", "DoRA with rslora", "LoHa", "LoHa, effective", "LoKr", "LoKr, decomposed", "LoKr, whole matrices"]
)
def test_adapters_of_peft(tiny_checkpoint: SanaCheckpoint, transformer: Any, tmp_path: Path, kind: str) -> None:
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    model = get_peft_model(transformer, peft_configs()[kind])
    randomized(model, seed=5, factor=0.3)
    model.save_pretrained(str(tmp_path / "lora"))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(0.7)
    wanted = model.merge_and_unload().state_dict()
    lora = Lora(tmp_path / "lora", 0.7)
    assert_same_weights(with_loras(tiny_checkpoint, lora), wanted, base, changed=30)
    assert_same_weights(reference(tiny_checkpoint, lora), wanted, base, changed=30)


def fused(transformer: Any, loras: list[Path], scales: list[Any]) -> dict[str, Tensor]:
    """The weights that diffusers' transformer computes with under `set_adapters`, by its own merge."""
    names = [path.name for path in loras]
    for path in loras:
        state, metadata = SanaPipeline.lora_state_dict(str(path), return_lora_metadata=True)
        transformer.load_lora_adapter(state, prefix="transformer", adapter_name=path.name, metadata=metadata)
    transformer.set_adapters(names, scales)
    transformer.fuse_lora(adapter_names=names)
    transformer.unload_lora()
    return transformer.state_dict()


def test_several_doras_and_loras_as_in_diffusers(tiny_checkpoint: SanaCheckpoint, tmp_path: Path) -> None:
    """In their order: the norm of a DoRA is that of the weight without the others."""
    options = {"first": {"use_dora": True, "lora_alpha": 6}, "second": {"lora_alpha": 3}, "third": {"use_dora": True}}
    loras, scales = [], [0.7, -0.4, 1.2]
    for seed, (name, more) in enumerate(options.items()):
        loras.append(diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / name, seed=seed, r=4, **more))
    transformer = load_transformer(tiny_checkpoint)
    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    wanted = fused(transformer, loras, scales)
    given = [Lora(path, scale) for path, scale in zip(loras, scales, strict=True)]
    assert_same_weights(with_loras(tiny_checkpoint, *given), wanted, base, changed=30)
    assert_same_weights(reference(tiny_checkpoint, *given), wanted, base, changed=30)


def test_scales_of_layers_as_in_diffusers(tiny_checkpoint: SanaCheckpoint, tmp_path: Path) -> None:
    """diffusers looks for its keys anywhere in a name, so these have the dots that make them whole words."""
    path = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=4, lora_alpha=6)
    transformer = load_transformer(tiny_checkpoint)
    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    scales = {"blocks.0.attn1": 0.5, "attn2": -0.25, "ff": 2.0, "": 0.7}
    wanted = fused(
        transformer, [path], [{f".{key}." if key and "blocks" not in key else key: scale for key, scale in scales.items()}]
    )
    found = with_loras(tiny_checkpoint, lora_at(path, {"transformer_blocks.0.attn1": 0.5, "attn2": -0.25, "ff": 2.0, "*": 0.7}))
    assert_same_weights(found, wanted, base, changed=30)


def test_scales_of_layers_are_recorded_and_in_the_reference(tiny_checkpoint: SanaCheckpoint, tmp_path: Path) -> None:
    path = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=4)
    lora = lora_at(path, {"attn1": 0.5, "transformer_blocks.1-9": 0.25, "*": 2.0})
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=[lora])
    (overlay,) = checkpoint.record().loras
    assert (overlay.scale, overlay.layer_scales) == (2.0, (("attn1", 0.5), ("transformer_blocks.1-9", 0.25)))
    assert checkpoint.sha256 != open_checkpoint(str(tiny_checkpoint.folder), loras=[Lora(path, 2.0)]).sha256
    base = {name: value.float() for name, value in tiny_checkpoint.weights("transformer").items()}
    assert_same_weights(with_loras(tiny_checkpoint, lora), reference(tiny_checkpoint, lora), base, changed=30)
    with pytest.raises(UsageError, match="for layers that it does not change"):
        open_checkpoint(str(tiny_checkpoint.folder), loras=[lora_at(path, {"attn3": 0.5})])


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "LoHa", "diff", "DoRA of rows", "DoRA of PEFT"])
@pytest.mark.parametrize("spelling", ["dots", "kohya"])
def test_names_of_the_original_code(tiny_checkpoint: SanaCheckpoint, tmp_path: Path, kind: str, spelling: str) -> None:
    """Against diffusers' own converter: the original weights with the adapter, converted."""
    original = original_weights(tiny_checkpoint)
    base = converted(original)
    layers = [
        name.removesuffix(".weight")
        for name, value in original.items()
        if value.ndim in (2, 4) and "depth" not in name and name.endswith(".weight")
    ]
    tensors = adapter(kind, {layer: original[f"{layer}.weight"].shape for layer in layers}, seed=3)
    for layer in layers:
        prefix = f"transformer.{layer}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        weight = original[f"{layer}.weight"]
        original[f"{layer}.weight"] = applied(weight, weight, own, 0.7).float()
    wanted = converted(original)
    if spelling == "kohya":
        tensors = {
            f"lora_unet_{flat(layer)}.{name.removeprefix(f'transformer.{layer}.')}": value
            for name, value in tensors.items()
            for layer in layers
            if name.startswith(f"transformer.{layer}.")
        }
    else:
        tensors = {name.replace("transformer.", "diffusion_model.", 1): value for name, value in tensors.items()}
    found = with_loras(tiny_checkpoint, Lora(write(tmp_path / "lora", tensors), 0.7))
    assert_same_weights(found, wanted, base, changed=20)


def converted(original: dict[str, Tensor]) -> dict[str, Tensor]:
    unused = {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    weights: dict[str, Tensor] = convert_sana_transformer_to_diffusers({**original, **unused})
    return {name: value.contiguous() for name, value in weights.items()}


def original_weights(checkpoint: SanaCheckpoint) -> dict[str, Tensor]:
    """The weights of a transformer with the names of the original code, as diffusers' converter expects them."""
    weights = {name: value.float() for name, value in checkpoint.weights("transformer").items()}
    names = {
        "patch_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.linear": "t_block.1",
        "caption_norm": "attention_y_norm",
        "proj_out": "final_layer.linear",
        "attn1.to_out.0": "attn.proj",
        "attn2.to_out.0": "cross_attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "ff.conv_inverted": "mlp.inverted_conv.conv",
        "ff.conv_depth": "mlp.depth_conv.conv",
        "ff.conv_point": "mlp.point_conv.conv",
    }
    fused = {"attn.qkv": [f"attn1.to_{part}" for part in "qkv"], "cross_attn.kv_linear": [f"attn2.to_{part}" for part in "kv"]}
    for name in [name for name in weights if "attn1.to_v." in name or "attn2.to_v." in name]:
        for whole, parts in fused.items():
            if parts[-1] in name:
                weights[name.replace(parts[-1], whole)] = torch.cat([weights.pop(name.replace(parts[-1], part)) for part in parts])
    weights["final_layer.scale_shift_table"] = weights.pop("scale_shift_table")
    found = {}
    for name, value in weights.items():
        new = name.replace("transformer_blocks.", "blocks.")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        found[new] = value
    return found


def test_a_dora_that_diffusers_saved(tiny_checkpoint: SanaCheckpoint, tmp_path: Path) -> None:
    path = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=4, lora_alpha=6, use_dora=True)
    assert any(name.endswith("lora_magnitude_vector") for name in load_file(path / "pytorch_lora_weights.safetensors"))
    transformer = load_transformer(tiny_checkpoint)
    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    assert_same_weights(with_loras(tiny_checkpoint, Lora(path, 0.6)), fused(transformer, [path], [0.6]), base, changed=30)
