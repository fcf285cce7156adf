"""The configs of the small Sana: the real classes, narrow, for pictures of 128 px (latents of 4x4)."""

from __future__ import annotations

from typing import Any

from sana_export.architectures import AUTOENCODER, TEXT_ENCODER

#: The encoder does nothing at full resolution: its first stage is left out, as in the first DC-AE.
VAE: dict[str, Any] = {
    **AUTOENCODER,
    "encoder_block_out_channels": (32, 32, 64, 64, 128, 256),
    "decoder_block_out_channels": (16, 32, 64, 64, 128, 256),
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1, 1),
    "encoder_qkv_multiscales": ((),) * 6,
}
TEXT: dict[str, Any] = {
    **TEXT_ENCODER,
    "attn_implementation": "eager",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "num_layers": 6,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 256,
    "caption_channels": 192,
    "mlp_ratio": 2.5,
    "sample_size": 4,
}
#: The published settings.
SCHEDULER: dict[str, Any] = {"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
