"""Seeded weights that keep activations at unit scale, for any config of the three networks.

Every parameter is drawn by the first rule whose pattern its name matches, from a generator seeded by its own name: a change
of one config leaves the weights of everything else as they were. The rules are for networks with random weights: the scale
of every branch is chosen so that the prompt, the guidance and each layer leave their mark on the image, while a sampling
run stays bounded, because the velocity holds a share of the latents themselves (`_tie_output_to_input`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sana_export.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """Parameters whose name holds `pattern` are normal around `mean`, with deviation `std` (over sqrt(fan-in) if `fan_in`)."""

    pattern: str
    std: float
    mean: float = 0.0
    fan_in: bool = False


def _weight(pattern: str, gain: float) -> Rule:
    return Rule(pattern, gain, fan_in=True)


_BIASES = Rule(r"\.bias$", 0.1)

#: Branch outputs are divided by sqrt(layers) (`_scale_branches`), so deep configs keep the stream of shallow ones.
TRANSFORMER = (
    Rule(r"(^|\.)scale_shift_table$", 0.3),
    Rule(r"caption_norm\.weight$", 0.2, mean=1.0),
    Rule(r"norm_[qk]\.weight$", 0.2, mean=1.0),
    _weight(r"linear_1\.weight$", 1.0),
    _weight(r"linear_2\.weight$", 1.7),
    _weight(r"attn1\.to_out\.0\.weight$", 2.0),
    _weight(r"attn2\.to_[qk]\.weight$", 1.3),
    _weight(r"attn2\.to_out\.0\.weight$", 1.0),
    _weight(r"ff\.conv_(inverted|depth|point)\.weight$", 1.4),
    _weight(r"\.weight$", 1.0),
    _BIASES,
)

AUTOENCODER = (
    Rule(r"decoder\.norm_out\.weight$", 0.2, mean=1.0),
    Rule(r"norm(_out)?\.weight$", 0.5, mean=2.0),
    _weight(r"conv(1|_inverted)\.weight$", 0.3),
    _weight(r"conv2\.weight$", 1.5),
    _weight(r"decoder\.conv_in\.weight$", 0.7),
    _weight(r"\d\.conv\.weight$", 0.5),
    _weight(r"decoder\.conv_out\.weight$", 0.6),
    _weight(r"\.weight$", 1.0),
    _BIASES,
)

#: The norms multiply by 1 + weight. Embeddings are multiplied by sqrt(hidden size) in the network.
TEXT_ENCODER = (
    _weight(r"embed_tokens\.weight$", 1.0),
    Rule(r"post_\w+_layernorm\.weight$", 0.1, mean=-0.4),
    Rule(r"norm\.weight$", 0.2),
    _weight(r"[qk]_proj\.weight$", 1.5),
    _weight(r"\.weight$", 1.0),
)


def _generator(*key: object) -> Any:
    import torch

    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _draw(model: Any, rules: tuple[Rule, ...], *key: object) -> None:
    """Overwrite every parameter of `model` in place. A parameter that no rule names is an error."""
    import torch

    for name, parameter in model.named_parameters():
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        if rule is None:
            raise UsageError("no rule to draw this parameter", found=name, wanted=[rule.pattern for rule in rules])
        fan_in = math.prod(parameter.shape[1:]) if rule.fan_in else 1
        values = torch.randn(parameter.shape, generator=_generator(*key, name))
        parameter.data.copy_(values.mul_(rule.std / math.sqrt(fan_in)).add_(rule.mean))


def _scale_branches(transformer: Any) -> None:
    """Divide the outputs of all three branches of a block by sqrt(layers): the stream ends at the same scale at any depth."""
    scale = len(transformer.transformer_blocks) ** -0.5
    for block in transformer.transformer_blocks:
        for branch in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
            branch.weight.data.mul_(scale)


def _tie_output_to_input(transformer: Any, share: float = 1.2) -> None:
    """Let the velocity hold about `share` of the latents, read back from the stream by the transposed patch embedding.

    A flow dx/dt = share * x + f(x, t, prompt) forgets the noise that it starts from, as a trained one does; without it the
    noise stays in the image and a sampling run only adds to it.
    """
    embedding = transformer.patch_embed.proj.weight.data.flatten(1)
    pseudo_inverse = embedding.T / embedding.pow(2).sum(0).unsqueeze(1)
    transformer.proj_out.weight.data.add_(pseudo_inverse, alpha=share)


def _centre_pixels(vae: Any) -> None:
    """Give each colour of the last convolution weights of mean zero, so that its relu'd input leaves no offset."""
    weight = vae.decoder.conv_out.weight.data
    weight.sub_(weight.mean(dim=(1, 2, 3), keepdim=True))


def fill_transformer(transformer: Any, seed: int) -> None:
    """Draw the weights of a `SanaTransformer2DModel` in place."""
    _draw(transformer, TRANSFORMER, seed, "transformer")
    _scale_branches(transformer)
    _tie_output_to_input(transformer)


def fill_vae(vae: Any, seed: int) -> None:
    """Draw the weights of an `AutoencoderDC` in place."""
    _draw(vae, AUTOENCODER, seed, "vae")
    _centre_pixels(vae)


def fill_text_encoder(text_encoder: Any, seed: int) -> None:
    """Draw the weights of a `Gemma2Model` in place."""
    _draw(text_encoder, TEXT_ENCODER, seed, "text_encoder")


FILL: dict[str, Callable[[Any, int], None]] = {
    "transformer": fill_transformer,
    "vae": fill_vae,
    "text_encoder": fill_text_encoder,
}
