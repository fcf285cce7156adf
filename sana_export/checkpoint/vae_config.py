"""The decoder that the config of an autoencoder describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sana_export.architectures import AUTOENCODER_DEFAULTS


@dataclass(frozen=True)
class DecoderStage:
    """The part of a decoder that works at one resolution: an upsampling, except in the lowest stage, and blocks."""

    #: Its channels.
    channels: int
    #: Number of blocks. A stage at full resolution without blocks has no upsampling either: the last convolution upsamples.
    depth: int
    #: The class of its blocks.
    block: str
    #: The norm of its blocks.
    norm: str
    #: The activation of its residual blocks.
    activation: str
    #: Channels of an attention head.
    head_dim: int

    @property
    def local(self) -> bool:
        """Whether its output depends only on pixels nearby: no block attends to the whole image."""
        return self.depth == 0 or self.block == "ResBlock"


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder."""

    #: From full resolution down.
    stages: tuple[DecoderStage, ...]
    #: Channels of the latents.
    latent_channels: int
    #: Whether the latents are added to the first convolution's output.
    in_shortcut: bool
    #: One of `supported.VAE_UPSAMPLES`.
    upsample: str
    #: The activation before the last convolution.
    out_activation: str
    #: The factor on latents that the transformer was trained with.
    scaling_factor: float

    @property
    def stride(self) -> int:
        """Image pixels per latent pixel, in each direction."""
        return int(2 ** (len(self.stages) - 1))

    @property
    def local_stages(self) -> int:
        """The number of stages at the end of the decoder without attention. Their outputs depend only on pixels near them."""
        return next((number for number, stage in enumerate(self.stages) if not stage.local), len(self.stages))


def read_decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that `config` (vae/config.json) describes. What it must satisfy is in supported.py."""
    full = AUTOENCODER_DEFAULTS | dict(config)
    channels = full["decoder_block_out_channels"]
    keys = ("decoder_block_types", "decoder_norm_types", "decoder_act_fns")
    blocks, norms, activations = (_each(full[key], len(channels)) for key in keys)
    rows = zip(channels, full["decoder_layers_per_block"], blocks, norms, activations, strict=True)
    stages = tuple(DecoderStage(*row, full["attention_head_dim"]) for row in rows)
    return DecoderConfig(
        stages,
        full["latent_channels"],
        bool(full["decoder_in_shortcut"]),
        full["upsample_block_type"],
        full["decoder_conv_act_fn"],
        float(full["scaling_factor"]),
    )


def _each(value: str | Sequence[str], count: int) -> tuple[str, ...]:
    """A value for each stage, from one for all of them or from one for each."""
    return (value,) * count if isinstance(value, str) else tuple(value)
