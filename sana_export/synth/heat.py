"""Makes random weights behave like trained ones under quantization: heavy tails, and a few channels far larger than the others.

Trained networks have channels whose activations are 10 to 100 times as large as the others', always the same ones (arXiv
2211.10438). Normal weights have none, so every way to quantize them is good. Here the layers that write a tensor multiply a few of
its channels, and the layers that read it divide by most of that factor. So the function keeps its character, its images stay like
those of normal weights, and nothing exceeds what our graphs store in half precision.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: One channel of so many is hot.
SPACING = 256
#: The least and the largest factor of a hot channel. They are spread evenly on a logarithmic scale.
FACTORS = (10.0, 100.0)
#: A layer that reads hot channels divides its weights for them by this power of the factors.
UNDONE = 0.75
#: How heavy the tails of matrices are: the kurtosis is 9, that of Student's t with 5 degrees of freedom.
TAIL = 1 / 7


@dataclass(frozen=True)
class HeatRule:
    """What some parameters do to the channels of one tensor."""

    #: The tensor's name. Each block of a network has its own, unless the name begins with "/".
    tensor: str
    #: It applies to parameters whose names contain this regular expression.
    pattern: str
    #: Which axis of the parameter are the tensor's channels.
    axis: int
    #: It multiplies the channels by this power of their factors.
    power: float = 1.0
    #: It adds so many times the factors - 1 instead.
    added: float = 0.0
    #: The only row that it changes. None: all.
    row: int | None = None
    #: The tensor is the first half of the channels.
    half: bool = False
    #: A norm divides the tensor by its root mean square, which the hot channels raise. This multiplies by it.
    normed: bool = False


def _written(tensor: str, pattern: str, *, half: bool = False) -> HeatRule:
    return HeatRule(tensor, pattern, 0, half=half)


def _read(tensor: str, pattern: str, *, normed: bool = False) -> HeatRule:
    return HeatRule(tensor, pattern, 1, power=-UNDONE, normed=normed)


_GATED = (_written("hidden", r"conv_depth\.(weight|bias)$", half=True), _read("hidden", r"conv_point\.weight$"))
_TRANSFORMER = (
    # Almost the same value at every pixel, as in trained networks. Otherwise the norms would divide by what a few channels happen
    # to be, and sampling would be chaotic. The other channels have a standard deviation of about 1.5.
    HeatRule("/stream", r"^patch_embed\.proj\.bias$", 0, added=1.5),
    _read("/stream", r"attn1\.to_[qkv]\.weight$|ff\.conv_inverted\.weight$|^proj_out\.weight$", normed=True),
    _read("/stream", r"attn2\.to_q\.weight$"),
    HeatRule("attention input", r"\.scale_shift_table$", 1, row=1, added=1.0),
    _read("attention input", r"attn1\.to_[qkv]\.weight$"),
    HeatRule("feed-forward input", r"\.scale_shift_table$", 1, row=4, added=1.0),
    _read("feed-forward input", r"ff\.conv_inverted\.weight$"),
    _written("value", r"attn1\.to_v\.weight$"),
    _read("value", r"attn1\.to_out\.0\.weight$"),
    _written("cross value", r"attn2\.to_v\.(weight|bias)$"),
    _read("cross value", r"attn2\.to_out\.0\.weight$"),
    *_GATED,
)
#: The rules of each network. All that match a parameter apply.
RULES: dict[str, tuple[HeatRule, ...]] = {
    "transformer": _TRANSFORMER,
    "controlnet": (
        *_TRANSFORMER,
        _read("/stream", r"^(input_block|controlnet_blocks\.\d+)\.weight$"),
    ),
    "vae": _GATED,
    "text_encoder": (
        HeatRule("attention input", r"\.input_layernorm\.weight$", 0, added=1.0),
        _read("attention input", r"[qkv]_proj\.weight$"),
        HeatRule("feed-forward input", r"\.pre_feedforward_layernorm\.weight$", 0, added=1.0),
        _read("feed-forward input", r"(gate|up)_proj\.weight$"),
        _written("hidden", r"up_proj\.weight$"),
        _read("hidden", r"down_proj\.weight$"),
    ),
}


def heavy_tailed(values: Tensor) -> Tensor:
    """Change standard normal `values` in place to values of unit variance with heavy tails (arXiv 1010.2265)."""
    return values.mul_(values.square().mul_(TAIL / 2).exp_()).mul_((1 - 2 * TAIL) ** 0.75)


@dataclass(frozen=True)
class Heat:
    """The heat of one network."""

    #: A row of `RULES`.
    component: str
    #: The shapes of its parameters.
    shapes: Mapping[str, tuple[int, ...]]
    #: The seed of the choice of channels.
    seed: int

    def applied(self, name: str, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """The `pieces` of the parameter `name`, flat and in order, changed in place by all rules that match."""
        import torch

        rules = [(rule, self._change(name, rule)) for rule in RULES[self.component] if re.search(rule.pattern, name)]
        shape, first = self.shapes[name], 0
        if not rules:
            yield from pieces
            return
        for piece in pieces:
            places = torch.arange(first, first + len(piece))
            for rule, change in rules:
                index = places // math.prod(shape[rule.axis + 1 :]) % shape[rule.axis]
                if rule.added:
                    inside = True if rule.row is None else places // shape[1] == rule.row
                    piece += change[index] * inside
                else:
                    piece *= change[index]
            first += len(piece)
            yield piece

    def _change(self, name: str, rule: HeatRule) -> Tensor:
        """What is added to each index of the rule's axis, or what it is multiplied by."""
        import torch

        channels = self.shapes[name][rule.axis]
        factors = self.factors(name, rule.tensor, channels // 2 if rule.half else channels)
        if rule.half:
            factors = torch.cat([factors, torch.ones(channels - len(factors))])
        if rule.added:
            return rule.added * (factors - 1)
        return factors**rule.power * (factors.square().mean().sqrt() if rule.normed else 1)

    def factors(self, name: str, tensor: str, channels: int) -> Tensor:
        """The factors [channels] of a tensor that the parameter `name` reads or writes: 1, except for hot channels."""
        import torch

        block = "" if tensor.startswith("/") else _block(name)
        digest = hashlib.sha256(f"heat/{self.seed}/{self.component}/{block}/{tensor}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        count = max(1, channels // SPACING)
        hot = torch.randperm(channels, generator=generator)[:count]
        low, high = map(math.log, FACTORS)
        factors = torch.ones(channels)
        factors[hot] = torch.exp(low + (high - low) * (torch.arange(count) + 0.5) / count)
        return factors


def _block(name: str) -> str:
    """The beginning of a parameter's name that those of its block share. It ends with the block's number."""
    found = re.match(r".*?\.\d+\.(?=\D)", name)
    return found[0] if found else ""
