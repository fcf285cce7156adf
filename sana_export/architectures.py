"""The networks of the checkpoints: how their transformers differ, and the exact published configs (data only).

A config is the content of a config.json: keyword arguments of the class in diffusers or transformers.
Sources: the scripts that made the published folders (scripts/convert_sana_to_diffusers.py and convert_dcae_to_diffusers.py of
diffusers), NVlabs/Sana's configs/, and the classes' own defaults, which the tests compare with the installed classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

#: Image pixels per latent pixel, in each direction.
LATENT_STRIDE = 32
QK_NORM = "rms_norm_across_heads"
#: Scale of the sine-cosine position table by native size. Transformers of other sizes have no position table.
INTERPOLATION_SCALE = {2048: 1.0, 4096: 2.0}
#: `flow_shift` of the scheduler by native size, if it is not 3.0.
FLOW_SHIFT = {4096: 6.0}


@dataclass(frozen=True)
class Architecture:
    """One transformer. Self-attention heads have 32 channels, and cross-attention is as wide as self-attention."""

    #: Its name in this table.
    name: str
    #: Number of blocks.
    layers: int
    #: Heads of self-attention.
    heads: int
    #: Heads of cross-attention.
    cross_heads: int
    #: Channels of a cross-attention head.
    cross_head_dim: int
    #: Number of parameters.
    parameters: int
    #: The norm on queries and keys. None: no norm.
    qk_norm: str | None = None
    #: Whether it is distilled (SANA-Sprint): it takes the guidance scale as an input and samples with SCMScheduler.
    guidance_embeds: bool = False
    #: Width of the prompt embeddings.
    caption_channels: int = 2304

    def transformer(self, native_size: int) -> Config:
        """transformer/config.json of `SanaTransformer2DModel`, trained on images of `native_size` x `native_size` pixels."""
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
        """scheduler/scheduler_config.json: its `_class_name`, and the values that differ from the class's defaults."""
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

#: The defaults of `SanaTransformer2DModel`, which apply to keys that the config.json of an older release does not have.
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

#: The config of `SanaControlNetModel`: keys and defaults are those of `SanaTransformer2DModel`, except for the number of blocks.
CONTROLNET_DEFAULTS: Config = {
    key: value
    for key, value in TRANSFORMER_DEFAULTS.items()
    if key not in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale")
} | {"num_layers": 7}


def controlnet_config(transformer: Mapping[str, Any], layers: int) -> Config:
    """The config of a ControlNet with `layers` blocks of the transformer with the config `transformer`."""
    return {**{key: transformer[key] for key in CONTROLNET_DEFAULTS}, "num_layers": layers}


_STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_MULTISCALES = ((), (), (), (5,), (5,), (5,))
_WIDTHS = (128, 256, 512, 512, 1024, 1024)

#: vae/config.json of `AutoencoderDC`: the f32c32 autoencoder sana-1.1, which every published checkpoint uses.
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

#: How the config of DC-AE-Lite (mit-han-lab/dc-ae-lite-f32c32-diffusers) differs: a decoder without attention that skips the stage
#: at full resolution. Source: dc-ae-lite-f32c32-sana-1.1 in the authors' code (dc_ae.py of efficientvit). Widths, encoder and
#: scaling factor are those of `AUTOENCODER` there. An export reads all of them from the file.
LITE: Config = {
    "decoder_block_types": ("ResBlock",) * 6,
    "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
    "decoder_qkv_multiscales": ((),) * 6,
    "upsample_block_type": "pixel_shuffle",
    "decoder_conv_act_fn": "silu",
}

#: The defaults of `AutoencoderDC`, which apply to keys that a config.json does not have.
AUTOENCODER_DEFAULTS: Config = {
    **AUTOENCODER,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "scaling_factor": 1.0,
}

#: text_encoder/config.json of `Gemma2Model`: Gemma-2-2B-IT, which every published checkpoint uses.
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

_SIGMAS_OFF = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"), False)
#: A diffusion's noise schedule, which a flow's scheduler reads for some options.
_BETAS = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
_DPM_SOLVER: Config = {
    "num_train_timesteps": 1000,
    "flow_shift": 1.0,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "prediction_type": "epsilon",
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "thresholding": False,
    **_SIGMAS_OFF,
    **_BETAS,
}
_FLOW_MATCH: Config = {"num_train_timesteps": 1000, "shift": 1.0}
_FLOW_MATCH_SIGMAS: Config = {**_FLOW_MATCH, "shift_terminal": None, "invert_sigmas": False, **_SIGMAS_OFF}

#: The defaults of the schedulers in diffusers, for the keys that sampling reads.
SCHEDULER_DEFAULTS: dict[str, Config] = {
    "DPMSolverMultistepScheduler": {
        **_DPM_SOLVER,
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "rescale_betas_zero_snr": False,
    },
    "DPMSolverSinglestepScheduler": {**_DPM_SOLVER, "lower_order_final": False},
    "UniPCMultistepScheduler": {
        "num_train_timesteps": 1000,
        "flow_shift": 1.0,
        "solver_type": "bh2",
        "solver_order": 2,
        "solver_p": None,
        "predict_x0": True,
        "disable_corrector": [],
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "use_flow_sigmas": False,
        "final_sigmas_type": "zero",
        "thresholding": False,
        "shift_terminal": None,
        "sigma_min": None,
        "sigma_max": None,
        "rescale_betas_zero_snr": False,
        **_SIGMAS_OFF,
        **_BETAS,
    },
    "FlowMatchEulerDiscreteScheduler": {**_FLOW_MATCH_SIGMAS, "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": _FLOW_MATCH,
    "FlowMatchLCMScheduler": {**_FLOW_MATCH_SIGMAS, "scale_factors": None},
    "SCMScheduler": {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5},
}

#: The keys that identify a checkpoint: those that change shapes or results.
_IDENTIFYING_KEYS = (
    *("num_layers", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim"),
    *("caption_channels", "sample_size", "interpolation_scale", "qk_norm", "guidance_embeds"),
)


def identity(transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[object, ...]:
    """A value that is equal for checkpoints of the same architecture, size and schedule. Missing keys get the class's defaults."""
    full = TRANSFORMER_DEFAULTS | dict(transformer)
    return (*(full[key] for key in _IDENTIFYING_KEYS), scheduler.get("_class_name"), scheduler.get("flow_shift"))
