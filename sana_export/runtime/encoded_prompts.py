"""Prompts that are encoded once and kept: what `encode_prompt` returns, and what a call takes in place of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sana_export.formats.arrays import Float32
from sana_export.numeric import integer
from sana_export.records import ModelInfo
from sana_export.runtime.inputs import LIMITS, instruction_text, negative_prompts, texts
from sana_export.runtime.prompt import PromptEmbeddings


class EncodedPrompts(NamedTuple):
    """Encoded prompts, in the order of diffusers' `encode_prompt`. B prompts, L = max_sequence_length, C channels.

    The fields have the names of the parameters of a call that take them.
    """

    #: float32 [B, L, C]. Rows after a prompt's tokens are zero.
    prompt_embeds: Float32
    #: float32 [B, L]: 1 for the tokens of a prompt.
    prompt_attention_mask: Float32
    #: As `prompt_embeds`, of the negative prompts. None without classifier-free guidance.
    negative_prompt_embeds: Float32 | None
    #: As `prompt_attention_mask`.
    negative_prompt_attention_mask: Float32 | None

    @property
    def arrays(self) -> dict[str, Float32]:
        """The fields that are not None, by name: `runtime(**encoded.arrays)`, `numpy.savez(path, **encoded.arrays)`."""
        fields = zip(type(self).__annotations__, self, strict=True)
        return {name: value for name, value in fields if value is not None}


class PromptTexts(NamedTuple):
    """What `encode_prompt` was asked to encode."""

    #: As `Plan.texts`: the negative prompts, if any, then the prompts.
    texts: tuple[tuple[tuple[str, ...], str], ...]
    #: Rows of an encoded prompt.
    max_sequence_length: int


def prompt_texts(
    model: ModelInfo,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    instruction: bool | Sequence[str] | None,
    max_sequence_length: int | None,
    *,
    guided: bool,
) -> PromptTexts:
    """Check the parameters of `encode_prompt`. Raises UsageError."""
    limit = LIMITS["max_sequence_length"]
    length = model.max_sequence_length if max_sequence_length is None else max_sequence_length
    length = integer("max_sequence_length", length, int(limit.least), int(limit.most))
    prompts = texts("prompt", prompt)
    negatives = negative_prompts(negative_prompt, len(prompts))
    positive = (prompts, instruction_text(instruction, model.instruction))
    # The checkpoint of distilled guidance has one branch.
    return PromptTexts(((negatives, ""), positive) if guided and not model.guidance_embeds else (positive,), length)


def to_arrays(embeddings: PromptEmbeddings, to_host: Any, length: int) -> EncodedPrompts:
    """The rows of `embeddings`, whose last branch has the prompts, padded to `length`."""
    found = embeddings.gather(to_host)
    branches, batch, rows, channels = found.shape
    values = np.zeros((branches, batch, length, channels), dtype=np.float32)
    mask = np.zeros((branches, batch, length), dtype=np.float32)
    values[:, :, :rows], mask[:, :, :rows] = found, embeddings.context_mask
    negative = (values[0], mask[0]) if branches == 2 else (None, None)
    return EncodedPrompts(values[-1], mask[-1], *negative)
