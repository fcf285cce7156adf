"""The graphs with a transformer's weights, and the transformer's layers that a LoRA can change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from sana_export.architectures import ARCHITECTURES
from sana_export.graphs.context import Context
from sana_export.graphs.denoiser import Denoiser
from sana_export.graphs.numerics import NUMERICS

TINY = ARCHITECTURES["tiny-random"].transformer(1024)
Weights = Mapping[str, Tensor]


def graphs(config: Mapping[str, Any], precision: str) -> dict[str, Callable[[Weights], nn.Module]]:
    """By name, functions that build the graphs of a transformer of `config` from its weights."""
    numerics = NUMERICS[precision]
    return {
        "context": lambda weights: Context(config, weights, numerics),
        "denoiser": lambda weights: Denoiser(config, weights, numerics, clamp=True, pag_layers=(1,)),
    }


def shapes(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of diffusers' transformer of `config`, on the meta device."""
    with torch.device("meta"):
        return dict(SanaTransformer2DModel.from_config(dict(config)).state_dict())


def matrices(weights: Weights) -> set[str]:
    """The modules that a LoRA can change, according to diffusers' transformer and independently of the graphs."""
    return {
        name.removesuffix(".weight")
        for name, value in weights.items()
        if name.endswith(".weight") and value.ndim > 1 and "conv_depth" not in name
    }
