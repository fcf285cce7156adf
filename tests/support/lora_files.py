"""LoRA files for tests: saved by PEFT and by diffusers, and files that must be refused."""

from __future__ import annotations

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


def randomized(model: Any, seed: int = 0) -> Any:
    """`model` with new random adapter matrices, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return model


def peft_lora(transformer: Any, folder: Path, **options: Any) -> Path:
    """An adapter in PEFT's format, saved by PEFT."""
    config = LoraConfig(target_modules=list(TARGETS), init_lora_weights=True, **options)
    randomized(get_peft_model(transformer, config)).save_pretrained(str(folder))
    return folder


def diffusers_lora(transformer: Any, folder: Path, *, metadata: bool = True, **options: Any) -> Path:
    """An adapter in diffusers' format, saved by diffusers."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    transformer.add_adapter(LoraConfig(target_modules=list(TARGETS), init_lora_weights=True, **options))
    randomized(transformer)
    extra = _collate_lora_metadata({"transformer": transformer}) if metadata else {}
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer), **extra)
    return folder


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    return folder


LAYER = "transformer.transformer_blocks.0.attn1.to_q"


def pair(layer: str = LAYER, *, width: int = 64, rank: int = 4, up: str = ".lora_B.weight") -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.zeros(rank, width), f"{layer}{up}": torch.zeros(width, rank)}


def refusals(width: int) -> dict[str, tuple[dict[str, torch.Tensor], tuple[str, ...]]]:
    depthwise = "transformer.transformer_blocks.0.ff.conv_depth"
    return {
        "DoRA": (
            {**pair(width=width), f"{LAYER}.lora_magnitude_vector": torch.zeros(1)},
            ("DoRA", f"{LAYER}.lora_magnitude_vector"),
        ),
        "kohya": ({"lora_unet_blocks_0_attn_qkv.lora_down.weight": torch.zeros(2, 2)}, ("lora_unet_blocks_0_attn_qkv", LAYER[:12])),
        "text encoder": (pair("text_encoder.layers.0.self_attn.q_proj"), ("text_encoder.layers.0", "transformer_blocks.0")),
        "FLUX": (
            pair("transformer.single_transformer_blocks.0.attn.to_q"),
            ("another model", "single_transformer_blocks.0.attn.to_q"),
        ),
        "wider": (pair(width=2 * width), (f"{LAYER}.lora_A.weight", f"[4, {2 * width}]", f"[4, {width}]")),
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
