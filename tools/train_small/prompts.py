"""Prompts as the pipeline encodes them: the instruction read once a step, and only the prompt's own tokens for each sample.

What reaches the transformer are the rows that diffusers' SanaPipeline keeps: BOS, the instruction's last token (which may merge
with the prompt's first), the prompt. An empty prompt without instruction leaves the row of BOS alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sana_export.synth.tokenizer import instruction


class PromptEncoder:
    """Encodes captions with a text encoder that is being trained. `tokenizer` is a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.instruction = "\n".join(instruction())
        self.known: list[int] = tokenizer.encode(self.instruction).ids
        self._ids: dict[str, list[int]] = {}

    def ids(self, prompt: str) -> list[int]:
        """The tokens from the instruction's last one on."""
        found = self._ids.get(prompt)
        if found is None:
            ids = self.tokenizer.encode(self.instruction + prompt.lower().strip()).ids
            start = len(self.known) - 1
            if ids[:start] != self.known[:start]:
                raise ValueError(f"{prompt!r} merges with more than the instruction's last token")
            found = self._ids[prompt] = ids[start:]
        return found

    def __call__(self, text_encoder: Any, prompts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Rows [B, L, C] and their mask [B, L], float32. None stands for the unconditional branch. Differentiable."""
        device = text_encoder.device
        cache = DynamicCache()
        prefix = text_encoder(torch.tensor([self.known[:-1]], device=device), past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(len(prompts), -1, -1, -1)
            layer.values = layer.values.expand(len(prompts), -1, -1, -1)
        ids = [self.ids(prompt or "") for prompt in prompts]
        longest = max(map(len, ids))
        # Attention is causal: the padding on the right reaches no row that is kept.
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
        rows = text_encoder(padded, past_key_values=cache, use_cache=True).last_hidden_state
        bos = prefix.last_hidden_state[:, :1].expand(len(prompts), -1, -1)
        kept = [0 if prompt is None else len(row) for prompt, row in zip(prompts, ids, strict=True)]
        mask = torch.arange(longest + 1, device=device) <= torch.tensor(kept, device=device).unsqueeze(1)
        return torch.cat([bos, rows], dim=1).float(), mask.float()
