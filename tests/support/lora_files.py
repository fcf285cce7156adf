"""LoRA files for tests: saved by PEFT and by diffusers, and files that must be refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from sana_export.checkpoint.checkpoint import SanaCheckpoint

#: Linear layers and 1x1 convolutions of every kind that adapters are trained on.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "linear_1", "proj_out", "proj")


def load_transformer(checkpoint: SanaCheckpoint) -> Any:
    """diffusers' transformer of the checkpoint, to make adapters for."""
    return SanaTransformer2DModel.from_pretrained(checkpoint.folder, subfolder="transformer")


def randomized(model: Any, seed: int = 0, factor: float = 0.1) -> Any:
    """`model` with new random adapter matrices, so that B is not zero. The norms of a DoRA change by up to a half."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "magnitude" in name:
            value.data = value.data * (0.5 + torch.rand(value.shape, generator=generator))
        elif any(part in name for part in ("lora_", "lokr_", "hada_")):
            value.data = factor * torch.randn(value.shape, generator=generator)
    return model


def peft_lora(transformer: Any, folder: Path, **options: Any) -> Path:
    """An adapter in PEFT's format, saved by PEFT."""
    config = LoraConfig(target_modules=list(TARGETS), init_lora_weights=True, **options)
    randomized(get_peft_model(transformer, config)).save_pretrained(str(folder))
    return folder


def diffusers_lora(transformer: Any, folder: Path, *, metadata: bool = True, seed: int = 0, **options: Any) -> Path:
    """An adapter in diffusers' format, saved by diffusers."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    transformer.add_adapter(LoraConfig(target_modules=list(TARGETS), init_lora_weights=True, **options))
    randomized(transformer, seed)
    extra = _collate_lora_metadata({"transformer": transformer}) if metadata else {}
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer), **extra)
    return folder


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    return folder


def flat(layer: str) -> str:
    return layer.replace(".", "_")


def kohya(layer: str, matrix: str) -> str:
    return f"{layer}.lora_{'down' if matrix == 'A' else 'up'}.weight"


#: How each program spells the name of a layer's matrix A or B. They all write down the same LoRA.
SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda layer, matrix: f"transformer.{layer}.lora_{matrix}.weight",
    "diffusers, older": lambda layer, matrix: f"transformer.{layer}.lora.{'down' if matrix == 'A' else 'up'}.weight",
    "diffusers, lora_linear_layer": lambda layer, matrix: (
        f"transformer.{layer}.lora_linear_layer.{'down' if matrix == 'A' else 'up'}.weight"
    ),
    "bare": lambda layer, matrix: f"{layer}.lora_{matrix}.weight",
    "bare, an adapter's name": lambda layer, matrix: f"{layer}.lora_{matrix}.default.weight",
    "compiled": lambda layer, matrix: f"transformer._orig_mod.{layer}.lora_{matrix}.weight",
    "compiled blocks": lambda layer, matrix: f"transformer.{layer.replace('.0.', '.0._orig_mod.', 1)}.lora_{matrix}.weight",
    "ComfyUI": lambda layer, matrix: f"diffusion_model.{layer}.lora_{matrix}.weight",
    "ComfyUI, down and up": lambda layer, matrix: kohya(f"diffusion_model.{layer}", matrix),
    "kohya": lambda layer, matrix: kohya(f"lora_unet_{flat(layer)}", matrix),
    "LyCORIS": lambda layer, matrix: kohya(f"lycoris_{flat(layer)}", matrix),
    "OneTrainer": lambda layer, matrix: kohya(f"lora_transformer_{flat(layer)}", matrix),
    "OneTrainer, dots": lambda layer, matrix: kohya(f"lora_transformer.{layer}", matrix),
    "OneTrainer, down and up": lambda layer, matrix: kohya(f"transformer.{layer}", matrix),
    "DistributedDataParallel": lambda layer, matrix: f"module.{layer}.lora_{matrix}.weight",
}


def respelled(tensors: Mapping[str, torch.Tensor], spelling: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """The LoRA `tensors`, with diffusers' names, as the program `spelling` writes it. `alpha`: with alpha tensors too."""
    found = {}
    for name, value in tensors.items():
        layer, matrix = name.removeprefix("transformer.").removesuffix(".weight").rsplit(".lora_", 1)
        new = SPELLINGS[spelling](layer, matrix)
        found[new] = value
        if alpha is not None:
            found[f"{new[: new.rindex('.lora')]}.alpha"] = torch.tensor(alpha)
    return found


LAYER = "transformer.transformer_blocks.0.attn1.to_q"


def pair(layer: str = LAYER, *, width: int = 64, rank: int = 4, up: str = ".lora_B.weight") -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.zeros(rank, width), f"{layer}{up}": torch.zeros(width, rank)}


def refusals(width: int) -> dict[str, tuple[dict[str, torch.Tensor], tuple[str, ...]]]:
    depthwise = "transformer.transformer_blocks.0.ff.conv_depth"
    return {
        "DoRA without norms": (
            {
                **pair(width=width),
                **pair(LAYER.replace("to_q", "to_k"), width=width),
                f"{LAYER}.lora_magnitude_vector": torch.ones(width),
            },
            ("is incomplete", "no lora_magnitude_vector of transformer_blocks.0.attn1.to_k"),
        ),
        "DoRA of another width": (
            {**pair(width=width), f"{LAYER}.dora_scale": torch.zeros(1, 2 * width)},
            (f"{LAYER}.dora_scale", f"[1, {2 * width}]", f"[{width}, 1] or [1, {width}]"),
        ),
        "original names": (
            {f"lora_unet_blocks_0_attn_qkv.lora_{end}.weight": torch.zeros(2, 2) for end in ("down", "up")},
            ("lora_unet_blocks_0_attn_qkv.lora_down.weight", "[2, 2]", "for blocks.0.attn.qkv.weight of ["),
        ),
        "original names, deeper": (
            {f"blocks.99.attn.qkv.lora_{matrix}.weight": torch.zeros(2, 2) for matrix in "AB"},
            ("another model", "blocks.99.attn.qkv, which"),
        ),
        "a fused layer and its part": (
            {**{f"blocks.0.attn.qkv.lora_{matrix}.weight": torch.zeros(2, 2) for matrix in "AB"}, **pair(width=width)},
            ("two tensors for one matrix of transformer_blocks.0.attn1.to_q", "blocks.0.attn.qkv.lora_A.weight"),
        ),
        "norms of a fused layer's columns": (
            {
                "blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, width),
                "blocks.0.attn.qkv.lora_B.weight": torch.zeros(3 * width, 2),
                "blocks.0.attn.qkv.dora_scale": torch.zeros(1, width),
            },
            ("blocks.0.attn.qkv.dora_scale", f"[{3 * width}, 1]"),
        ),
        "text encoder": (
            pair("text_encoder.layers.0.self_attn.q_proj"),
            ("changes the text encoder", "text_encoder.layers.0", "transformer_blocks.0"),
        ),
        "kohya's text encoder": (
            {"lora_te_layers_0_self_attn_q_proj.lora_down.weight": torch.zeros(2, 2)},
            ("changes the text encoder", "lora_te_layers_0"),
        ),
        "half a LoKr": ({f"{LAYER}.lokr_w1": torch.zeros(2, 2)}, ("is incomplete", "no lokr_w2 of")),
        "half a factor": (
            {f"{LAYER}.lokr_w1": torch.zeros(2, 2), f"{LAYER}.lokr_w2_a": torch.zeros(2, 2)},
            ("is incomplete", "no lokr_w2_b of"),
        ),
        "a LoKr of another width": (
            {f"{LAYER}.lokr_w1": torch.zeros(2, 2), f"{LAYER}.lokr_w2": torch.zeros(width, width // 2)},
            (f"{LAYER}.lokr_w2", f"[{width}, {width // 2}]", f"[{width // 2}, {width // 2}]"),
        ),
        "a LoKr that does not divide": (
            {f"{LAYER}.lokr_w1": torch.zeros(3, 2), f"{LAYER}.lokr_w2": torch.zeros(width // 3, width // 2)},
            (f"{LAYER}.lokr_w2", "does not fit this checkpoint"),
        ),
        "half a LoHa": (
            {"lora_unet_transformer_blocks_0_attn1_to_q.hada_w1_a": torch.zeros(2, 2)},
            ("is incomplete", "no hada_w1_b of transformer_blocks.0.attn1.to_q"),
        ),
        "a LoHa of two ranks": (
            {
                **{f"{LAYER}.hada_w{index}_a": torch.zeros(width, 1 + index) for index in (1, 2)},
                **{f"{LAYER}.hada_w{index}_b": torch.zeros(1 + index, width) for index in (1, 2)},
            },
            (f"{LAYER}.hada_w2_a", f"[{width}, 3]", f"[{width}, 2]"),
        ),
        "two kinds": (
            {**pair(width=width), f"{LAYER}.diff": torch.zeros(width, width)},
            ("tensors of several kinds for transformer_blocks.0.attn1.to_q", f"{LAYER}.diff"),
        ),
        "a difference of another width": (
            {f"{LAYER}.diff": torch.zeros(width, 2 * width)},
            (f"{LAYER}.diff", f"[{width}, {2 * width}]", f"[{width}, {width}]"),
        ),
        "differences of biases": (
            {f"{LAYER}.diff": torch.zeros(2), f"{LAYER}.diff_b": torch.zeros(2)},
            ("biases", f"{LAYER}.diff_b"),
        ),
        "norms": ({"lycoris_caption_norm.w_norm": torch.zeros(2)}, ("a LoRA with norms", "lycoris_caption_norm.w_norm")),
        "(IA)³": ({f"{LAYER}.weight": torch.zeros(2), f"{LAYER}.on_input": torch.zeros(())}, ("an (IA)³", f"{LAYER}.on_input")),
        "T-LoRA": ({f"{LAYER}.lambda_layer": torch.zeros(1, 2)}, ("a T-LoRA", f"{LAYER}.lambda_layer")),
        "Tucker LoKr": ({f"{LAYER}.lokr_t2": torch.zeros(2, 2)}, ("Tucker", f"{LAYER}.lokr_t2")),
        "OneTrainer's embeddings": (
            {**pair(width=width), "bundle_emb.x.gemma": torch.zeros(2)},
            ("the text encoder", "bundle_emb.x.gemma"),
        ),
        "too high a rank": (
            {f"{LAYER}.lora_A.weight": torch.zeros(16_385, width), f"{LAYER}.lora_B.weight": torch.zeros(width, 16_385)},
            (f"{LAYER}.lora_A.weight", "too high a rank", "16385"),
        ),
        "OFT": ({f"{LAYER}.oft_R.weight": torch.zeros(2, 2)}, ("an OFT", f"{LAYER}.oft_R.weight")),
        "LoCon": ({**pair(width=width), f"{LAYER}.lora_mid.weight": torch.zeros(4, 4)}, ("Tucker", f"{LAYER}.lora_mid.weight")),
        "two adapters": (
            {
                f"{layer}.lora_{matrix}.{name}.weight": torch.zeros(size)
                for layer, name in ((LAYER, "first"), (LAYER.replace("to_q", "to_k"), "second"))
                for matrix, size in (("A", (4, width)), ("B", (width, 4)))
            },
            ("several adapters", "lora_A.first", "lora_A.second"),
        ),
        "twice": (
            {**pair(width=width), **pair(LAYER.removeprefix("transformer."), width=width)},
            ("two tensors for one matrix of transformer_blocks.0.attn1.to_q",),
        ),
        "whole weights": ({f"{LAYER}.weight": torch.zeros(width, width)}, ("is not a LoRA", f"{LAYER}.weight", "--transformer")),
        "SDXL": (
            {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)},
            ("another model", "U-Net of Stable Diffusion", "lora_unet_down_blocks_1"),
        ),
        "Stable Diffusion 3": (pair("transformer.transformer_blocks.0.attn.to_q"), ("another model", "Stable Diffusion 3")),
        "Wan": (pair("diffusion_model.blocks.0.self_attn.q"), ("another model", "Wan")),
        "deeper": (
            pair("transformer.transformer_blocks.99.attn1.to_q"),
            ("another model", "transformer_blocks.99.attn1.to_q, which"),
        ),
        "unknown kind": ({f"{LAYER}.lora_C.weight": torch.zeros(2, 2)}, ("unknown kind", f"{LAYER}.lora_C.weight")),
        "alpha": ({**pair(width=width), f"{LAYER}.alpha": torch.zeros(2)}, (f"{LAYER}.alpha", "is not a number", "[2]")),
        "infinite alpha": ({**pair(width=width), f"{LAYER}.alpha": torch.tensor(torch.inf)}, (f"{LAYER}.alpha", "[inf]")),
        "PEFT without a config": (
            pair("base_model.model.transformer_blocks.0.attn1.to_q", width=width),
            ("is incomplete", "no adapter_config.json"),
        ),
        "FLUX": (
            pair("transformer.single_transformer_blocks.0.attn.to_q"),
            ("another model", "FLUX", "single_transformer_blocks.0.attn.to_q"),
        ),
        "wider": (pair(width=2 * width), (f"{LAYER}.lora_A.weight", f"[4, {2 * width}]", f"[4, {width}]")),
        "rank 0": (pair(width=width, rank=0), (f"{LAYER}.lora_A.weight", f"[0, {width}]", f"[1, {width}]")),
        "one rank": (
            {f"{LAYER}.lora_A.weight": torch.zeros(4, width), f"{LAYER}.lora_B.weight": torch.zeros(width, 3)},
            (f"{LAYER}.lora_B.weight", f"[{width}, 3]", f"[{width}, 4]"),
        ),
        "half": (
            {f"{LAYER}.lora_A.weight": torch.zeros(4, width)},
            ("is incomplete", "no lora_B of transformer_blocks.0.attn1.to_q"),
        ),
        "bias": ({**pair(width=width), f"{LAYER}.lora_B.bias": torch.zeros(width)}, (f"{LAYER}.lora_B.bias",)),
        "depthwise": (
            {f"{depthwise}.lora_A.weight": torch.zeros(4, 8, 3, 3), f"{depthwise}.lora_B.weight": torch.zeros(8, 4, 1, 1)},
            ("depthwise", f"{depthwise}.lora_A.weight", "train without conv_depth"),
        ),
        "quantized": ({name: value.to(torch.int8) for name, value in pair(width=width).items()}, ("I8", "F32, F16, BF16")),
        "empty": ({}, ("no tensors",)),
    }
