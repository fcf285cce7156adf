"""The shapes of the synthetic checkpoints: configs of diffusers' and transformers' classes (data only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]

#: What every published Sana's scheduler folder says, as far as it differs from the class's defaults.
SCHEDULER: Config = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}

_STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_MULTISCALES = ((), (), (), (5,), (5,), (5,))
#: The published f32c32 autoencoder, without its widths and depths.
_AUTOENCODER: Config = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": _STAGES,
    "decoder_block_types": _STAGES,
    "encoder_qkv_multiscales": _MULTISCALES,
    "decoder_qkv_multiscales": _MULTISCALES,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 0.41407,
}
_TRANSFORMER: Config = {
    "in_channels": 32,
    "out_channels": 32,
    "patch_size": 1,
    "sample_size": 16,
    "interpolation_scale": None,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "qk_norm": None,
    "timestep_scale": 1.0,
}
#: Gemma-2-2B, without its widths and depth. `vocab_size` is the tokenizer's, filled in where the checkpoint is made.
_TEXT_ENCODER: Config = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class SyntheticRecipe:
    """The configs of a checkpoint's components, as keyword arguments of their classes.

    `dataclasses.replace(recipe, transformer={**recipe.transformer, "qk_norm": "rms_norm_across_heads"})` makes a variation.
    """

    name: str
    transformer: Config
    vae: Config
    text_encoder: Config
    scheduler: Config = field(default_factory=lambda: SCHEDULER)


#: Parameters in millions, text encoder + transformer + autoencoder (its decoder):
#: tiny 0.38 + 0.97 + 0.58 (0.43) = 1.93, 7.9 MB in float32; mid 20.6 + 60.1 + 21.2 (19.3) = 101.9, 408 MB.
RECIPES: dict[str, SyntheticRecipe] = {
    recipe.name: recipe
    for recipe in (
        SyntheticRecipe(
            name="tiny",
            transformer={
                **_TRANSFORMER,
                "num_attention_heads": 4,
                "attention_head_dim": 32,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 64,
                "cross_attention_dim": 128,
                "num_layers": 3,
                "caption_channels": 64,
            },
            vae={
                **_AUTOENCODER,
                "encoder_block_out_channels": (16, 16, 32, 32, 32, 32),
                "decoder_block_out_channels": (16, 32, 32, 64, 64, 64),
                "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
                "decoder_layers_per_block": (1, 1, 1, 1, 1, 1),
            },
            text_encoder={
                **_TEXT_ENCODER,
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                # Unequal to head_dim, so that a graph that takes one for the other is found out.
                "query_pre_attn_scalar": 48,
            },
        ),
        SyntheticRecipe(
            name="mid",
            transformer={
                **_TRANSFORMER,
                "num_attention_heads": 18,
                "attention_head_dim": 32,
                "num_cross_attention_heads": 8,
                "cross_attention_head_dim": 72,
                "cross_attention_dim": 576,
                "num_layers": 11,
                "caption_channels": 512,
            },
            vae={
                **_AUTOENCODER,
                "encoder_block_out_channels": (32, 64, 128, 128, 128, 128),
                "decoder_block_out_channels": (64, 128, 256, 256, 512, 512),
                "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
                "decoder_layers_per_block": (2, 2, 2, 2, 1, 1),
            },
            text_encoder={
                **_TEXT_ENCODER,
                "hidden_size": 512,
                "intermediate_size": 1536,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "query_pre_attn_scalar": 128,
            },
        ),
    )
}
