"""Seeded random weights that keep activations at unit scale, for any config of the three networks, drawn in pieces.

The first rule whose pattern matches a parameter's name decides its distribution. Its generator is seeded with its name, so a change
of one config does not change the weights of anything else. The scale of every branch is chosen so that the prompt, the guidance and
each layer have a visible effect on the image. Sampling stays bounded because a share of the latents is added to the velocity
(`_tie_output_to_input`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sana_export.errors import UsageError
from sana_export.synth.heat import Heat, heavy_tailed

if TYPE_CHECKING:
    from torch import Generator, Tensor

#: Values that are drawn at a time: 16 MiB.
PIECE = 1 << 22
#: torch draws normal values in blocks of this size. Pieces that are multiples of it give the same values as one call.
BLOCK = 16


@dataclass(frozen=True)
class Rule:
    """The normal distribution of some parameters."""

    #: It applies to parameters whose name contains this regular expression.
    pattern: str
    #: Standard deviation.
    std: float
    #: Mean.
    mean: float = 0.0
    #: Divide the deviation by sqrt(fan-in).
    fan_in: bool = False
    #: The parameter is the output of a transformer block's branch: divide it by sqrt(layers), so that the residual stream has the
    #: same scale at any depth.
    branch: bool = False


def _weight(pattern: str, gain: float, branch: bool = False) -> Rule:
    return Rule(pattern, gain, fan_in=True, branch=branch)


_BIASES = Rule(r"\.bias$", 0.1)

TRANSFORMER = (
    Rule(r"(^|\.)scale_shift_table$", 0.3),
    Rule(r"caption_norm\.weight$", 0.2, mean=1.0),
    Rule(r"norm_[qk]\.weight$", 0.2, mean=1.0),
    _weight(r"linear_1\.weight$", 1.0),
    _weight(r"linear_2\.weight$", 1.7),
    _weight(r"attn1\.to_out\.0\.weight$", 2.0, branch=True),
    _weight(r"attn2\.to_[qk]\.weight$", 1.3),
    _weight(r"attn2\.to_out\.0\.weight$", 1.0, branch=True),
    _weight(r"ff\.conv_point\.weight$", 1.4, branch=True),
    _weight(r"ff\.conv_(inverted|depth)\.weight$", 1.4),
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
    _weight(r"decoder\.conv_out\.(conv\.)?weight$", 0.6),
    _weight(r"\.weight$", 1.0),
    _BIASES,
)

#: Gemma's norms multiply by 1 + weight, and it multiplies embeddings by sqrt(hidden size).
TEXT_ENCODER = (
    _weight(r"embed_tokens\.weight$", 1.0),
    Rule(r"post_\w+_layernorm\.weight$", 0.1, mean=-0.4),
    Rule(r"norm\.weight$", 0.2),
    _weight(r"[qk]_proj\.weight$", 1.5),
    _weight(r"\.weight$", 1.0),
)


#: A new ControlNet's own layers are zero. A trained one's are not.
CONTROLNET = (_weight(r"^controlnet_blocks\.", 0.4), *TRANSFORMER)

RULES = {"transformer": TRANSFORMER, "vae": AUTOENCODER, "text_encoder": TEXT_ENCODER, "controlnet": CONTROLNET}


@dataclass(frozen=True)
class RandomWeights:
    """The float32 weights of one network."""

    #: A row of `RULES`.
    component: str
    #: The shapes of its parameters.
    shapes: Mapping[str, tuple[int, ...]]
    #: The seed of all of them.
    seed: int
    #: Whether they behave like trained ones under quantization (heat.py).
    hot: bool = False

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The values of the parameter `name`, flat, in pieces of about `PIECE`. Raises UsageError if no rule matches its name."""
        finish = _FINISH.get((self.component, name))
        pieces = self._drawn(name) if finish is None else iter([finish(self, self._whole(name)).flatten()])
        yield from Heat(self.component, self.shapes, self.seed).applied(name, pieces) if self.hot else pieces

    def _whole(self, name: str) -> Tensor:
        import torch

        return torch.cat(list(self._drawn(name))).view(self.shapes[name])

    def _drawn(self, name: str) -> Iterator[Tensor]:
        import torch

        rule, shape = self._rule(name), self.shapes[name]
        std = rule.std / math.sqrt(math.prod(shape[1:]) if rule.fan_in else 1)
        share = self._layers() ** -0.5 if rule.branch else 1.0
        generator = _generator(self.seed, self.component, name)
        for count in _piece_sizes(math.prod(shape)):
            drawn = torch.randn(count, generator=generator)
            if self.hot and rule.fan_in:
                heavy_tailed(drawn)
            yield drawn.mul_(std).add_(rule.mean).mul_(share)

    def _rule(self, name: str) -> Rule:
        rules = RULES[self.component]
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        if rule is None:
            raise UsageError("there is no rule for this parameter", found=name, wanted=[rule.pattern for rule in rules])
        return rule

    def _layers(self) -> int:
        return sum(name.endswith("attn1.to_out.0.weight") for name in self.shapes)


def _generator(*key: object) -> Generator:
    import torch

    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _piece_sizes(count: int) -> Iterator[int]:
    """`count` as a sum of pieces. The last one is never shorter than a block, because torch draws fewer values differently."""
    while count >= PIECE + BLOCK:
        yield PIECE
        count -= PIECE
    yield count


def _tie_output_to_input(weights: RandomWeights, output: Tensor, share: float = 1.2) -> Tensor:
    """Add about `share` of the latents to the velocity. The transposed patch embedding reads them from the residual stream.

    A flow dx/dt = share * x + f(x, t, prompt) forgets the noise that it starts from, as a trained one does. Otherwise the noise
    stays in the image.
    """
    embedding = weights._whole("patch_embed.proj.weight").flatten(1)
    pseudo_inverse = embedding.T / embedding.pow(2).sum(0).unsqueeze(1)
    return output.add_(pseudo_inverse, alpha=share)


def _center_pixels(weights: RandomWeights, output: Tensor) -> Tensor:
    """Make the mean of each color's weights in the last convolution zero, so that its non-negative input adds no offset."""
    return output.sub_(output.mean(dim=(1, 2, 3), keepdim=True))


#: Changes to whole parameters after they are drawn.
_FINISH: dict[tuple[str, str], Callable[[RandomWeights, Tensor], Tensor]] = {
    ("transformer", "proj_out.weight"): _tie_output_to_input,
    ("vae", "decoder.conv_out.weight"): _center_pixels,
    ("vae", "decoder.conv_out.conv.weight"): _center_pixels,
}


def fill(model: Any, component: str, seed: int, *, hot: bool = False) -> None:
    """Overwrite every parameter of the network `model`. `hot`: as in `RandomWeights`."""
    import torch

    parameters = dict(model.named_parameters())
    weights = RandomWeights(component, {name: tuple(value.shape) for name, value in parameters.items()}, seed, hot)
    for name, parameter in parameters.items():
        parameter.data.copy_(torch.cat(list(weights.pieces(name))).view(parameter.shape))
