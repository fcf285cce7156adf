"""The decoder and the encoder that the config of an autoencoder describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sana_export.architectures import AUTOENCODER_DEFAULTS


@dataclass(frozen=True)
class VaeStage:
    """The part of a decoder or encoder that works at one resolution: blocks, and except in the lowest stage a change of resolution.

    A decoder upsamples before its blocks, an encoder downsamples after them.
    """

    #: Its channels.
    channels: int
    #: Number of blocks. A stage at full resolution without blocks changes no resolution either: the decoder's last and the
    #: encoder's first convolution do.
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
    stages: tuple[VaeStage, ...]
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
        return _local_stages(self.stages)


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder."""

    #: From full resolution down.
    stages: tuple[VaeStage, ...]
    #: Channels of the latents.
    latent_channels: int
    #: Whether averages of channels are added to the last convolution's output.
    out_shortcut: bool
    #: One of `supported.VAE_DOWNSAMPLES`.
    downsample: str
    #: The factor on latents that the transformer was trained with.
    scaling_factor: float

    @property
    def local_stages(self) -> int:
        """The number of stages at the start of the encoder without attention."""
        return _local_stages(self.stages)


def _local_stages(stages: Sequence[VaeStage]) -> int:
    return next((number for number, stage in enumerate(stages) if not stage.local), len(stages))


def read_decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that `config` (vae/config.json) describes. What it must satisfy is in supported.py."""
    full = AUTOENCODER_DEFAULTS | dict(config)
    channels = full["decoder_block_out_channels"]
    keys = ("decoder_block_types", "decoder_norm_types", "decoder_act_fns")
    blocks, norms, activations = (_each(full[key], len(channels)) for key in keys)
    rows = zip(channels, full["decoder_layers_per_block"], blocks, norms, activations, strict=True)
    stages = tuple(VaeStage(*row, full["attention_head_dim"]) for row in rows)
    return DecoderConfig(
        stages,
        full["latent_channels"],
        bool(full["decoder_in_shortcut"]),
        full["upsample_block_type"],
        full["decoder_conv_act_fn"],
        float(full["scaling_factor"]),
    )


def read_encoder(config: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that `config` (vae/config.json) describes. What it must satisfy is in supported.py.

    diffusers has no keys for its norms and activations: they are RMSNorm and SiLU.
    """
    full = AUTOENCODER_DEFAULTS | dict(config)
    channels = full["encoder_block_out_channels"]
    blocks = _each(full["encoder_block_types"], len(channels))
    rows = zip(channels, full["encoder_layers_per_block"], blocks, strict=True)
    stages = tuple(VaeStage(*row, "rms_norm", "silu", full["attention_head_dim"]) for row in rows)
    return EncoderConfig(
        stages,
        full["latent_channels"],
        bool(full["encoder_out_shortcut"]),
        full["downsample_block_type"],
        float(full["scaling_factor"]),
    )


def _each(value: str | Sequence[str], count: int) -> tuple[str, ...]:
    """A value for each stage, from one for all of them or from one for each."""
    return (value,) * count if isinstance(value, str) else tuple(value)
