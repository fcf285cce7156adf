"""One step of a Sana transformer with the published widths: random inputs, diffusers' result and the graphs' result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sana_export.graphs.context import Context
from sana_export.graphs.denoiser import Denoiser
from sana_export.graphs.numerics import NUMERICS
from tests.support.full_width import seeded

Inputs = Mapping[str, torch.Tensor]


def draw_inputs(
    config: Mapping[str, Any], size: tuple[int, int], lengths: tuple[int, ...], *key: object
) -> dict[str, torch.Tensor]:
    """Inputs for one image with latents of `size`, and one guidance branch per prompt length (in tokens) in `lengths`.

    The latents fade to 1/50 from left to right. With `quieten` the norms' epsilon matters in the faint part.
    """
    generator = seeded(size, lengths, *key)
    tokens = max(lengths)
    inputs = {
        "latents": torch.randn(1, 32, *size, generator=generator) * torch.logspace(0, -1.7, size[1]),
        "timestep": torch.randint(1, 1000, (1,), generator=generator).float(),
        "prompt_embeds": torch.randn(len(lengths), 1, tokens, config["caption_channels"], generator=generator),
        "context_mask": (torch.arange(tokens) < torch.tensor(lengths).reshape(-1, 1, 1)).float(),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = 1.0 + 5.0 * torch.rand(1, generator=generator)
    return inputs


@torch.no_grad()
def quieten(transformer: Any) -> None:
    """Shrink the bias of the patch embedding, so that faint latents give a small stream."""
    transformer.patch_embed.proj.bias *= 0.01


@torch.no_grad()
def run_reference(transformer: Any, inputs: Inputs) -> torch.Tensor:
    """diffusers' noise_pred [K, 1, 32, h, w]."""
    branches = len(inputs["context_mask"])
    guidance = {}
    if "guidance" in inputs:  # the factor is the pipeline's
        guidance["guidance"] = inputs["guidance"].expand(branches) * transformer.config.guidance_embeds_scale
    out = transformer(
        inputs["latents"].repeat(branches, 1, 1, 1),
        encoder_hidden_states=inputs["prompt_embeds"].flatten(0, 1),
        encoder_attention_mask=inputs["context_mask"].flatten(0, 1),
        timestep=inputs["timestep"].expand(branches),
        **guidance,
    ).sample
    return out.unsqueeze(1)


class Graphs:
    """The two graphs that compute a step: context and denoiser."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], precision: str, *, clamp: bool) -> None:
        self.context = Context(config, weights, NUMERICS[precision])
        self.denoiser = Denoiser(config, weights, NUMERICS[precision], clamp=clamp)

    @torch.no_grad()
    def run(self, inputs: Inputs) -> torch.Tensor:
        """The graphs' noise_pred [K, 1, 32, h, w]."""
        others = {key: value for key, value in inputs.items() if key != "prompt_embeds"}
        perturbed = torch.zeros(len(inputs["context_mask"]))
        return self.denoiser(context=self.context(inputs["prompt_embeds"]), perturbed=perturbed, **others)
