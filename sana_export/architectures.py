"""The networks of the checkpoints: what tells their transformers apart, and the exact published configs (data only).

A config holds what the checkpoint's config.json says of the network: keyword arguments of the class in diffusers or transformers.
Sources: the scripts that made the published folders (scripts/convert_sana_to_diffusers.py and convert_dcae_to_diffusers.py of
diffusers), NVlabs/Sana's configs/, and the classes' defaults for what those leave out; the tests compare these with the installed
classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

#: One pixel of the latents stands for a square of this many pixels.
LATENT_STRIDE = 32
QK_NORM = "rms_norm_across_heads"
#: Scale of the sine-cosine position table by native size; where there is none the transformer has no position table.
INTERPOLATION_SCALE = {2048: 1.0, 4096: 2.0}
#: `flow_shift` of the scheduler at the sizes where it is not 3.0.
FLOW_SHIFT = {4096: 6.0}


@dataclass(frozen=True)
class Architecture:
    """One transformer. Cross-attention is as wide as self-attention, whose heads hold 32 channels each.

    `parameters` counts the transformer's. `guidance_embeds` marks the distilled one (SANA-Sprint), which takes the guidance scale
    as an input and samples with SCMScheduler.
    """

    name: str
    layers: int
    heads: int
    cross_heads: int
    cross_head_dim: int
    parameters: int
    qk_norm: str | None = None
    guidance_embeds: bool = False
    caption_channels: int = 2304

    def transformer(self, native_size: int) -> Config:
        """transformer/config.json of `SanaTransformer2DModel` for images of `native_size` pixels a side."""
        return TRANSFORMER_DEFAULTS | {
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "num_cross_attention_heads": self.cross_heads,
            "cross_attention_head_dim": self.cross_head_dim,
            "cross_attention_dim": self.cross_heads * self.cross_head_dim,
            "caption_channels": self.caption_channels,
            "sample_size": native_size // LATENT_STRIDE,
            "interpolation_scale": INTERPOLATION_SCALE.get(native_size),
            "qk_norm": self.qk_norm,
            "guidance_embeds": self.guidance_embeds,
        }

    def scheduler(self, native_size: int) -> Config:
        """scheduler/scheduler_config.json with its `_class_name`, as far as it differs from the class's defaults."""
        if self.guidance_embeds:
            return {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5}
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "flow_shift": FLOW_SHIFT.get(native_size, 3.0),
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("tiny", 6, 8, 4, 64, 6_855_200, caption_channels=192),
        Architecture("tiny-random", 3, 4, 2, 64, 969_248, caption_channels=64),
        Architecture("tiny-sprint", 3, 4, 2, 64, 1_020_192, QK_NORM, guidance_embeds=True, caption_channels=64),
        Architecture("mid", 11, 18, 8, 72, 60_127_520, caption_channels=512),
        Architecture("Sana 600M", 28, 36, 16, 72, 591_747_872),
        Architecture("Sana 1600M", 20, 70, 20, 112, 1_604_462_752),
        Architecture("SANA-1.5 1.6B", 20, 70, 20, 112, 1_604_641_952, QK_NORM),
        Architecture("SANA-1.5 4.8B", 60, 70, 20, 112, 4_721_825_952, QK_NORM),
        Architecture("Sprint 0.6B", 28, 36, 16, 72, 593_501_216, QK_NORM, guidance_embeds=True),
        Architecture("Sprint 1.6B", 20, 70, 20, 112, 1_610_237_472, QK_NORM, guidance_embeds=True),
    )
}

#: What `SanaTransformer2DModel` takes for a key that a config.json leaves out, as files of older releases do.
TRANSFORMER_DEFAULTS: Config = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "dropout": 0.0,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "qk_norm": None,
    "timestep_scale": 1.0,
}

_STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_MULTISCALES = ((), (), (), (5,), (5,), (5,))
_WIDTHS = (128, 256, 512, 512, 1024, 1024)

#: vae/config.json of `AutoencoderDC`: the f32c32 autoencoder sana-1.1, the same in every published checkpoint.
AUTOENCODER: Config = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": _STAGES,
    "decoder_block_types": _STAGES,
    "encoder_block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": _MULTISCALES,
    "decoder_qkv_multiscales": _MULTISCALES,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "decoder_conv_act_fn": "relu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "scaling_factor": 0.41407,
}

#: text_encoder/config.json of `Gemma2Model`: Gemma-2-2B-IT, the same in every published checkpoint.
TEXT_ENCODER: Config = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
}

#: The keys by which a checkpoint is recognised: those that change shapes or the function.
_TOLD_APART_BY = (
    *("num_layers", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim"),
    *("caption_channels", "sample_size", "interpolation_scale", "qk_norm", "guidance_embeds"),
)


def identity(transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[object, ...]:
    """What two checkpoints of one architecture, size and schedule have in common. Keys left out take the class's defaults."""
    full = TRANSFORMER_DEFAULTS | dict(transformer)
    return (*(full[key] for key in _TOLD_APART_BY), scheduler.get("_class_name"), scheduler.get("flow_shift"))
