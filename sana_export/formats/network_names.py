"""Tensor names by which weights and LoRAs of other programs, quantizations and models are recognized."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class NamePattern:
    """Names of one origin."""

    #: What the tensors are, as a noun phrase.
    what: str
    #: Found in at least one name. Dots may be underscores.
    pattern: str

    def find(self, names: Iterable[str]) -> str | None:
        """The first of `names` that fits."""
        return next((name for name in names if re.search(self.pattern, name)), None)


#: Parts that wrappers of a module add to the names of its tensors: torch.compile, FSDP and activation checkpoints.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

#: The layers of a Sana transformer in the original code.
ORIGINAL_SANA = NamePattern(
    "the original Sana code",
    r"(^|[._])blocks[._]\d+[._](attn[._](qkv|proj)|cross_attn[._](q_linear|kv_linear|proj)|mlp[._](inverted|depth|point)_conv)"
    r"|(^|[._])(x_embedder[._]proj|y_embedder[._]y_proj|t_embedder[._]mlp|attention_y_norm|final_layer[._]linear)",
)

#: Weights in fewer bits than their names say. The first that fits counts.
QUANTIZED = (
    NamePattern("4-bit weights of bitsandbytes", r"\.(quant_state\.bitsandbytes__\w+|nested_absmax|quant_map|absmax)$"),
    NamePattern("8-bit weights of bitsandbytes", r"\.(SCB|weight_format)$"),
    NamePattern("4-bit weights of nunchaku (SVDQuant)", r"\.(wscales|wtscale|wzeros|smooth_factor(_orig)?)$|\.proj_(down|up)$"),
    NamePattern("4-bit weights of GPTQ or AWQ", r"\.(qweight|qzeros|g_idx)$"),
    NamePattern("quantized weights of torchao", r"[.:_](qdata|tensor_impl|quantized_linear_weight)\b|:_data$"),
    NamePattern("quantized weights of optimum-quanto", r"\._(data|scale|shift|packed)$"),
    NamePattern("quantized weights of ComfyUI", r"\.comfy_quant$"),
    NamePattern(
        "scaled 8-bit weights (fp8)", r"(^|\.)(scaled_fp8|(weight_|input_)?scale(_weight|_input|_inv)?|(weight|input)_scale_\w+)$"
    ),
    NamePattern("4-bit weights of NVIDIA ModelOpt or compressed-tensors", r"\.(weight_packed|_amax|weight_quantizer\.\w+)$"),
)

#: Networks other than Sana's transformer. The first that fits counts.
NETWORKS = (
    ORIGINAL_SANA,
    NamePattern("a VAE", r"^((first_stage_model|vae)\.|(encoder|decoder)\.(down|up|mid|conv|project|norm)|(post_)?quant_conv\.)"),
    NamePattern("FLUX or HunyuanVideo", r"(^|[._])(single_transformer_blocks|double_blocks|single_blocks)[._]\d"),
    NamePattern(
        "a U-Net of Stable Diffusion",
        r"(^|[._])((down|up)_blocks[._]\d+[._](attentions|resnets|\w*samplers)|mid_block[._]|(input|output)_blocks[._]\d|middle_block[._])",
    ),
    NamePattern(
        "a transformer such as Stable Diffusion 3, FLUX or Qwen-Image",
        r"(^|[._])(joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._]|(img|txt)_(mlp|mod)[._])",
    ),
    NamePattern("PixArt, LTX or CogVideoX", r"(^|[._])(adaln_single[._]|transformer_blocks[._]\d+[._]ff[._]net[._])"),
    NamePattern("Wan", r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)[._][qkvo]\b"),
    NamePattern("Lumina or Z-Image", r"(^|[._])(layers|context_refiner|noise_refiner)[._]\d+[._](attention|feed_forward)[._]"),
    NamePattern("a ControlNet", r"(^|[._])(controlnet_blocks|controlnet_x_embedder|input_block|zero_convs)[._]"),
    NamePattern("a CLIP text encoder", r"(^|[._])text_model[._]encoder[._]"),
    NamePattern("a T5 text encoder", r"(^|[._])encoder[._]block[._]\d+[._]layer[._]"),
    NamePattern("a language model such as Gemma or Llama", r"(^|[._])layers[._]\d+[._](self_attn|mlp|input_layernorm)[._]"),
)


def without_wrappers(name: str) -> str:
    """`name` without what wrappers of modules add."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def find_first(patterns: Iterable[NamePattern], names: Iterable[str]) -> tuple[NamePattern, str] | None:
    """The first of `patterns` that fits one of `names`, and that name."""
    known = list(names)
    return next(((pattern, found) for pattern in patterns if (found := pattern.find(known)) is not None), None)
