"""The checkpoint's components with the inputs and outputs that diffusers and transformers give them.

Each is composed of deployment graphs, so the mathematics is theirs (fp16 in range, the clamp). What the deployment graphs move out
of the step is inside again: these graphs fit programs that call a component as diffusers' pipelines do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from sana_export.graphs.context import Context
from sana_export.graphs.denoiser import Denoiser
from sana_export.graphs.numerics import MASKED, Numerics, parameter
from sana_export.graphs.text_encoder import TextEncoder, causal_mask
from sana_export.graphs.vae_decoder import VaeDecoder
from sana_export.graphs.vae_encoder import VaeEncoder

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]


class TextEncoderComponent(nn.Module):
    """input_ids int64 [B, S], attention_mask int64 [B, S] -> last_hidden_state float32 [B, S, C].

    As transformers' `Gemma2Model`: positions count from 0 whatever the mask is. The rows of tokens before a row's first token with
    mask 1 (padding on the left) see nothing; their values mean nothing there and here, and differ.
    """

    def __init__(self, config: Config, weights: Weights, numerics: Numerics) -> None:
        super().__init__()
        self.encoder = TextEncoder(config, weights, numerics)
        self.table = parameter(weights["embed_tokens.weight"], numerics.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens, dtype = input_ids.shape[1], self.table.dtype
        padding = ((1.0 - attention_mask.float()) * MASKED).to(dtype)
        mask = causal_mask(tokens, 0, dtype, input_ids.device) + padding[:, None, None, None]
        positions = torch.arange(tokens, device=input_ids.device)
        return self.encoder.encode(embedding(input_ids, self.table).float(), positions, mask)


class TransformerComponent(nn.Module):
    """hidden_states [B, C, h, w], encoder_hidden_states [B, S, C'], encoder_attention_mask int64 [B, S], timestep [B] ->
    out_hidden_states [B, C, h, w].

    As diffusers' `SanaTransformer2DModel`. A checkpoint with `guidance_embeds` has one more input, guidance [B], which already is
    multiplied by `guidance_embeds_scale`. All tensors but the mask are float32.
    """

    def __init__(self, config: Config, weights: Weights, numerics: Numerics, *, clamp: bool) -> None:
        super().__init__()
        config = {**config, "guidance_embeds_scale": 1.0}
        self.context = Context(config, weights, numerics)
        self.denoiser = Denoiser(config, weights, numerics, clamp=clamp)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        # One branch, whose batch is all rows.
        context = self.context(encoder_hidden_states.unsqueeze(0))
        mask = encoder_attention_mask.float().unsqueeze(0)
        branch = torch.zeros(1, device=hidden_states.device)
        guidance = None if guidance is None else guidance.unsqueeze(-1)
        out: Tensor = self.denoiser(hidden_states, timestep.unsqueeze(-1), context, mask, branch, guidance=guidance)
        return out.squeeze(0)


class VaeEncoderComponent(VaeEncoder):
    """sample float32 [B, 3, 32 h, 32 w] -> latent_sample [B, C, h, w], as diffusers' `AutoencoderDC.encode`: without a factor."""

    def __init__(self, config: Config, weights: Weights, numerics: Numerics) -> None:
        super().__init__({**config, "scaling_factor": 1.0}, weights, numerics)

    def forward(self, sample: Tensor) -> Tensor:
        return super().forward(sample)


class VaeDecoderComponent(VaeDecoder):
    """latent_sample float32 [B, C, h, w] -> sample [B, 3, 32 h, 32 w], as diffusers' `AutoencoderDC.decode`: without a factor."""

    def __init__(self, config: Config, weights: Weights, numerics: Numerics) -> None:
        super().__init__({**config, "scaling_factor": 1.0}, weights, numerics)

    def forward(self, latent_sample: Tensor) -> Tensor:
        return super().forward(latent_sample)
