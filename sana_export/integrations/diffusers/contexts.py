"""The prompts of a transformer's call: which rows of the batch are guidance branches, and their context, made once per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana_export.errors import UsageError
from sana_export.integrations.diffusers.tensors import Exchange
from sana_export.runtime.backends.base import DeviceTensor
from sana_export.runtime.pipeline import SanaRuntime


@dataclass(frozen=True, eq=False)
class PromptContext:
    """The prompts of K branches of B images, as graphs read them on the device. U of the branches have a prompt of their own."""

    #: Cross-attention keys and values.
    context: DeviceTensor
    #: float32 [U, B, L]: 1 for the tokens of a prompt.
    mask: DeviceTensor
    #: U.
    text_branches: int
    #: int64 [K]: the text branch of each branch.
    source: DeviceTensor


@dataclass(frozen=True, eq=False)
class _Kept:
    embeds: Tensor
    mask: Tensor
    perturbed: tuple[float, ...]
    #: The version of the weights that it was made with: LoRAs change the context too.
    version: int
    made: PromptContext


class PromptContexts:
    """Runs a context graph, which is named after its output, when the prompts change: not in every step.

    Prompts are compared by their values, so a callback may change them in place.
    """

    def __init__(self, runtime: SanaRuntime, exchange: Exchange, graph: str) -> None:
        self._runtime, self._exchange, self._graph = runtime, exchange, graph
        self._kept: _Kept | None = None

    def of(self, embeds: Tensor, mask: Tensor | None, perturbed: tuple[float, ...]) -> PromptContext:
        """The context of embeds [K * B, L, C] and mask [K * B, L] for branches with these flags.

        Raises UsageError for another mask, and for embeddings that are not finite.
        """
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        if tuple(mask.shape) != tuple(embeds.shape[:2]):
            raise UsageError(
                "encoder_attention_mask has the wrong shape for a bundle",
                found=list(mask.shape),
                wanted=f"{list(embeds.shape[:2])}, 1 for the tokens of a prompt",
            )
        kept = self._kept
        version = self._runtime.weights_version
        same = kept is not None and (kept.perturbed, kept.version) == (perturbed, version)
        if kept is not None and same and _equal(embeds, kept.embeds) and _equal(mask, kept.mask):
            return kept.made
        made = self._make(embeds, mask, perturbed)
        self._kept = _Kept(embeds.clone(), mask.clone(), perturbed, version, made)
        return made

    def _make(self, embeds: Tensor, mask: Tensor, perturbed: Sequence[float]) -> PromptContext:
        if not torch.isfinite(embeds).all():
            raise UsageError(
                "the prompt embeddings are not finite",
                found="NaN or infinite values, as in rows of the bundle's instruction, which no pipeline reads",
                wanted="embeddings of encode_prompt with the bundle's complex_human_instruction, or finite ones of your own",
            )
        branches = len(perturbed)
        embeds, mask = (value.unflatten(0, (branches, -1)).float() for value in (embeds, own_masks(embeds, mask)))
        source = list(range(branches))
        if perturbed[-1] and branches > 1 and _equal(embeds[-1], embeds[-2]) and _equal(mask[-1], mask[-2]):
            embeds, mask = embeds[:-1], mask[:-1]
            source[-1] -= 1
        # Masked tokens have weight 0, so the padding that all prompts share is left out.
        longest = self._padded(
            int(mask.any(0).any(0).nonzero().max()) + 1 if mask.any(-1).all() else mask.shape[-1], mask.shape[-1]
        )
        embeds, mask = embeds[..., :longest, :], mask[..., :longest]
        given = self._exchange.give(mask)
        context = self._runtime.run(self._graph, {"prompt_embeds": self._exchange.give(embeds)})[self._graph]
        numbers = self._exchange.give(torch.tensor(source), "int64")
        return PromptContext(context, given, len(embeds), numbers)

    def _padded(self, length: int, most: int) -> int:
        multiple = self._runtime.backend.text_multiple
        return min(-(-length // multiple) * multiple, most)


def own_masks(embeds: Tensor, mask: Tensor) -> Tensor:
    """The mask [N, L] in the order of the embeddings [N, L, C].

    For several prompts with several images each, diffusers repeats masks in another order than embeddings. A bundle's text encoder
    leaves the rows of padding at zero, which tells whose mask is whose.
    """
    filled = embeds.ne(0).any(-1).to(mask.dtype)
    exchanged = torch.equal(filled.sum(1).sort().values, mask.sum(1).sort().values)
    return filled if exchanged else mask


def same_in_all(values: Tensor, branches: int) -> bool:
    """Whether the `branches` equal parts of `values` [branches * B, ...] have the same values."""
    if branches == 1:
        return True
    if len(values) % branches:
        return False
    first, *others = values.chunk(branches)
    return all(torch.equal(first, other) for other in others)


def _equal(left: Tensor, right: Any) -> bool:
    return left.shape == right.shape and left.device == right.device and torch.equal(left, right)
