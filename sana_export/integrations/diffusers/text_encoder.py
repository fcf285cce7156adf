"""The text encoder's stand-in: token ids, as diffusers' pipelines pass them, to the rows that they read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma2Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.integrations.diffusers.module import BundleModule, graph_call, refusal
from sana_export.runtime.backends.base import DeviceTensor
from sana_export.runtime.prompt import PromptTokens, common_length


class BundleTextEncoder(BundleModule, Gemma2Model):  # type: ignore[misc]  # its methods for devices have other signatures
    """input_ids and attention_mask [B, S] -> last_hidden_state float32 [B, S, C].

    A prompt runs alone and without padding, after the keys and values of the instruction that the bundle stores. The rows of
    padding are zero: cross-attention masks them. The rows of a stored instruction that nobody runs are NaN, except the first one:
    Sana's pipelines do not read them.
    """

    @graph_call
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True, **unsupported: Any) -> Any:
        self.check_neutral(**unsupported)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = mask.sum(1).tolist()
        if not torch.equal(mask.long(), (torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)).long()):
            raise UsageError(
                "the text encoder of a bundle needs padding on the right", wanted='pipe.tokenizer.padding_side = "right"'
            )
        ids = [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        states = self._states(ids, input_ids.shape[1]).to(input_ids.device)
        return BaseModelOutputWithPast(last_hidden_state=states) if return_dict else (states,)

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Raises UsageError for another implementation than the bundle's."""
        if attn_implementation != "eager":
            raise refusal(
                "set_attn_implementation()", '"eager", which the bundle computes: only it applies the soft capping of Gemma-2'
            )

    def _states(self, ids: list[tuple[int, ...]], length: int) -> Tensor:
        """[B, `length`, C]: the states of texts of these ids, BOS first."""
        text = self.runtime.text
        known = text.instruction.token_ids
        tokens = []
        for own in ids:
            if not own or own[0] != known[0]:
                raise UsageError(
                    "a text for the bundle's text encoder does not start with BOS", found=own[:3], wanted=f"{known[0]} first"
                )
            shared = common_length(own, known[:-1])
            # A few tokens in common are chance: then every row may be read.
            shared = shared if shared > len(known) // 2 else 1
            tokens.append(PromptTokens(own, shared, shared, max(length, shared)))
        embeddings = text.encode([tokens], self._run, self.runtime.backend.text_multiple)
        states = torch.zeros(len(ids), length, text.instruction.bos_row.size, device=self.device)
        for index, prompt in enumerate(tokens):
            states[index, 1 : prompt.shared] = torch.nan
        for rows in embeddings.rows:
            _, index, first = rows.place
            source = rows.source
            values = torch.tensor(source) if isinstance(source, np.ndarray) else self.exchange.take(source)
            values = values[rows.item, rows.start : rows.stop]
            start = first and tokens[index].shared
            states[index, start : start + len(values)] = values
        return states

    def _run(self, inputs_embeds: Float32, prefix: Float32) -> DeviceTensor:
        feeds = {"inputs_embeds": inputs_embeds, "prefix": self._prefix(prefix)}
        return self.runtime.run("text_encoder", feeds)["prompt_embeds"]

    def _prefix(self, prefix: Float32) -> DeviceTensor:
        """The instruction's keys and values on the device. Only those of the last length are kept."""
        kept = self.__dict__.get("kept_prefix")
        if kept is None or kept[0] != prefix.shape[3]:
            kept = (prefix.shape[3], self.runtime.backend.to_device(np.ascontiguousarray(prefix)))
            self.kept_prefix = kept
        return kept[1]
