"""The decoder that the config of an autoencoder describes, and what in it the deployment graphs do not support."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sana_export.architectures import AUTOENCODER_DEFAULTS
from sana_export.errors import ArtifactError

#: The values that the graphs implement (graphs/vae_blocks.py has a table for each).
BLOCKS = ("ResBlock", "EfficientViTBlock")
NORMS = ("rms_norm", "batch_norm")
ACTIVATIONS = ("silu", "swish", "relu")
UPSAMPLES = ("interpolate", "pixel_shuffle")


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
    """A decoder that the graphs support."""

    #: From full resolution down.
    stages: tuple[DecoderStage, ...]
    #: Channels of the latents.
    latent_channels: int
    #: Whether the latents are added to the first convolution's output.
    in_shortcut: bool
    #: One of `UPSAMPLES`.
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
    """The decoder that `config` (vae/config.json) describes. Raises ArtifactError, with every problem, if it is not supported."""
    if problems := list(vae_problems(config)):
        raise ArtifactError(
            "the decoder that the VAE's config.json describes is not supported",
            found="; ".join(problems),
            wanted="an AutoencoderDC such as those of the published Sana models",
            fix="use another autoencoder: --vae dc-ae or --vae dc-ae-lite",
        )
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


def vae_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Every entry of `config` (vae/config.json) that the decoder's graphs do not support: the key, its value and what is supported.

    Keys that are missing have the defaults of diffusers' AutoencoderDC.
    """
    full = AUTOENCODER_DEFAULTS | dict(config)
    wrong = [key for key, (passes, _) in _RULES.items() if not passes(full[key])]
    yield from (f"{key} is {_short(full[key])}, supported: {_RULES[key][1]}" for key in wrong)
    if not wrong:
        yield from _contradictions(full)


def _contradictions(full: Mapping[str, Any]) -> Iterator[str]:
    """Entries that are supported alone but not together."""
    channels, depths = full["decoder_block_out_channels"], full["decoder_layers_per_block"]
    for key in _PER_STAGE:
        if not isinstance(full[key], str) and len(full[key]) != len(channels):
            yield f"{key} has {len(full[key])} entries, supported: {len(channels)}, one for each of decoder_block_out_channels"
            return
    if len(full["encoder_block_out_channels"]) != len(channels):
        stages = len(full["encoder_block_out_channels"])
        yield f"decoder_block_out_channels has {len(channels)} stages, supported: {stages}, as in encoder_block_out_channels"
    if 0 in depths[1:-1]:
        yield f"decoder_layers_per_block is {_short(depths)}, supported: at least 1 except in the first and the last stage"
    for stage, (fine, coarse) in enumerate(pairwise(channels)):
        if depths[stage] and (4 * fine) % coarse:
            yield f"decoder_block_out_channels is {_short(channels)}, supported: {coarse} divides 4 x {fine}"
    if len(full["decoder_qkv_multiscales"]) < len(channels):
        yield f"decoder_qkv_multiscales has {len(full['decoder_qkv_multiscales'])} entries, supported: {len(channels)}"
    if full["decoder_in_shortcut"] and channels[-1] % full["latent_channels"]:
        yield f"latent_channels is {full['latent_channels']}, supported: a divisor of the lowest stage's {channels[-1]} channels"


def _each(value: str | Sequence[str], count: int) -> tuple[str, ...]:
    """A value for each stage, from one for all of them or from one for each."""
    return (value,) * count if isinstance(value, str) else tuple(value)


def _short(value: object) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _among(names: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: isinstance(value, str) and value in names), " or ".join(names)


def _each_among(names: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    def passes(value: Any) -> bool:
        values = [value] if isinstance(value, str) else value
        return isinstance(values, list | tuple) and all(isinstance(name, str) and name in names for name in values)

    return passes, " or ".join(names)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _whole_numbers(least: int) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list | tuple) and len(values) > 1 and all(_whole(value, least) for value in values)


def _kernels(values: Any) -> bool:
    """Whether `values` are lists of kernel sizes that keep the size of an image."""
    rows = isinstance(values, list | tuple) and all(isinstance(row, list | tuple) for row in values)
    return rows and all(_whole(size, 1) and size % 2 for row in values for size in row)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


#: Entries with one value for each stage, or one string for all of them.
_PER_STAGE = ("decoder_layers_per_block", "decoder_block_types", "decoder_norm_types", "decoder_act_fns")
#: Key of the config to whether a value is supported, and what is.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "in_channels": (lambda value: _whole(value, 3) and value == 3, "3"),
    "latent_channels": (lambda value: _whole(value, 1), "a positive integer"),
    "attention_head_dim": (lambda value: _whole(value, 1), "a positive integer"),
    "encoder_block_out_channels": (_whole_numbers(1), "a list of at least two positive integers"),
    "decoder_block_out_channels": (_whole_numbers(1), "a list of at least two positive integers"),
    "decoder_layers_per_block": (_whole_numbers(0), "a list of at least two integers of 0 or more"),
    "decoder_block_types": _each_among(BLOCKS),
    "decoder_norm_types": _each_among(NORMS),
    "decoder_act_fns": _each_among(ACTIVATIONS),
    "decoder_qkv_multiscales": (_kernels, "a list of odd kernel sizes for each stage"),
    "upsample_block_type": _among(UPSAMPLES),
    "decoder_in_shortcut": (lambda value: isinstance(value, bool), "true or false"),
    "decoder_conv_act_fn": _among(ACTIVATIONS),
    "scaling_factor": (_positive, "a positive number"),
}
