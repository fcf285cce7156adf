"""Small autoencoders of any config with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sana_export.synth.checkpoint import build_pipeline
from sana_export.synth.recipes import RECIPES


def build_vae(config: Mapping[str, Any]) -> Any:
    """diffusers' autoencoder with the widths of `tiny-random`, `config` and random weights, batch norms included."""
    recipe = RECIPES["tiny-random"]
    vae = build_pipeline(replace(recipe, vae={**recipe.vae, **config})).vae
    for module in vae.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.5)
            module.running_var.uniform_(0.2, 2.0)
    return vae
