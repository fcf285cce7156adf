"""Text to prompt embeddings: tokens, the rows of the embedding table, and as few rows of the text encoder as are exact.

The reference is `_get_gemma_prompt_embeds` and `encode_prompt` of diffusers' SanaPipeline. There every prompt is encoded after
the instruction and padded to full length; of the result row 0 (BOS) and everything from the instruction's last token on are
kept. Gemma-2 is causal, so rows that a prompt shares with the instruction are the same for every prompt. The bundle stores
their keys and values, and only the rows after the first token that differs are run, without padding.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Float32
from sana_export.formats.safetensors_file import StoredTensor, TensorFile
from sana_export.manifest import Manifest

log = logging.getLogger(__name__)

#: inputs_embeds [B, S, C], prefix [layers, 2, kv_heads, P, head_dim], float32 on the host -> prompt_embeds [B, S, C] of a backend.
RunTextEncoder = Callable[[Float32, Float32], Any]

#: The most tokens in one text: attention windows, which the text encoder's graph leaves out, may bind beyond.
MAX_TOKENS = 2048
#: Characters of a truncated prompt's end that the warning shows.
_SHOWN = 80


@dataclass(frozen=True, eq=False)
class Instruction:
    """What the bundle knows of the instruction's n tokens.

    text: the lines joined with newlines. token_ids: n ids, the first is BOS. prefix: float32 [layers, 2, kv_heads, n - 1,
    head_dim], keys and values of all but the last token. bos_row: float32 [C], the text encoder's output at BOS.
    """

    text: str
    token_ids: tuple[int, ...]
    prefix: Float32
    bos_row: Float32


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the text encoder reads it: the rows that the denoiser gets are 0 and `first_kept` to the end of `ids`.

    The first `shared` ids are those of the instruction; 1 <= shared <= first_kept.
    """

    ids: tuple[int, ...]
    first_kept: int
    shared: int

    @property
    def kept_rows(self) -> int:
        return 1 + max(len(self.ids) - self.first_kept, 0)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `start` to `stop` of item `item` of `source` [n, S, C], a tensor of a backend or an array, and where they go:
    branch, number and first row of prompt_embeds [K, B, L, C]."""

    source: Any
    item: int
    start: int
    stop: int
    place: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """prompt_embeds [K, B, L, C] as the rows that it is put together from, with zeros elsewhere, and where there are any.

    shape: (K, B, L, C). context_mask: float32 [K, B, L], 1 on the rows of a prompt. The text encoder's outputs stay where they are
    until the backend moves their rows.
    """

    shape: tuple[int, int, int, int]
    rows: tuple[Rows, ...]
    context_mask: Float32

    @property
    def sources(self) -> dict[int, Any]:
        """What the rows are taken from, each once, by its id."""
        return {id(rows.source): rows.source for rows in self.rows}

    def gather(self, to_host: Callable[[Any], Any] = np.asarray) -> Float32:
        """prompt_embeds float32 on the host."""
        embeds = np.zeros(self.shape, dtype=np.float32)
        read = {key: to_host(source) for key, source in self.sources.items()}
        for rows in self.rows:
            branch, number, first = rows.place
            embeds[branch, number, first : first + rows.stop - rows.start] = read[id(rows.source)][
                rows.item, rows.start : rows.stop
            ]
        return embeds

    def repeated(self, count: int) -> PromptEmbeddings:
        """Every prompt `count` times, side by side."""
        branches, batch, length, channels = self.shape
        rows = [
            replace(rows, place=(rows.place[0], rows.place[1] * count + copy, rows.place[2]))
            for rows in self.rows
            for copy in range(count)
        ]
        return PromptEmbeddings(
            (branches, batch * count, length, channels), tuple(rows), np.repeat(self.context_mask, count, axis=1)
        )

    def padded(self, multiple: int, most: int) -> PromptEmbeddings:
        """With L filled up to a multiple of `multiple`, but not beyond `most`. Masked rows have weight 0, so this is exact."""
        branches, batch, length, channels = self.shape
        longer = max(length, min(-(-length // multiple) * multiple, most))
        mask = np.zeros((branches, batch, longer), dtype=np.float32)
        mask[..., :length] = self.context_mask
        return PromptEmbeddings((branches, batch, longer, channels), self.rows, mask)


class PromptEncoder:
    """Encodes prompts with a tokenizer, the stored instruction and the token embedding table [vocabulary, C].

    Raises ArtifactError, with `fix` as the line that mends it, where these do not belong together.
    """

    def __init__(self, tokenizer: Tokenizer, instruction: Instruction, embeddings: StoredTensor, *, fix: str | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.instruction, self.embeddings, self._fix = tokenizer, instruction, embeddings, fix
        self._check()

    @classmethod
    def load(cls, bundle: Path, manifest: Manifest, *, fix: str | None = None) -> PromptEncoder:
        """The encoder of a bundle, from its tokenizer/, instruction.safetensors and embeddings.safetensors."""
        path = bundle / "tokenizer" / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ArtifactError(f"{path} is damaged", found=error, wanted="a tokenizer", fix=fix) from error
        stored = TensorFile(bundle / "instruction.safetensors", fix=fix)
        instruction = Instruction(
            manifest.model.instruction,
            tuple(stored["token_ids"].read().tolist()),
            stored["prefix"].read(),
            stored["bos_row"].read(),
        )
        table = TensorFile(bundle / "embeddings.safetensors", fix=fix)["embed_tokens.weight"]
        return cls(tokenizer, instruction, table, fix=fix)

    def tokenize(self, text: str, *, max_sequence_length: int, instruct: bool) -> PromptTokens:
        """The tokens of `text`, after the instruction if `instruct`; logs a warning where it is longer than the limit.

        At most `max_sequence_length` rows are kept. Raises UsageError where that allows more than `MAX_TOKENS` tokens.
        """
        known = self.instruction.token_ids
        first_kept = len(known) - 1 if instruct else 1
        limit = first_kept + max_sequence_length - 1
        if limit > MAX_TOKENS:
            raise UsageError(
                "max_sequence_length is too large",
                found=max_sequence_length,
                wanted=f"1 to {MAX_TOKENS - first_kept + 1}",
            )
        text = text.lower().strip()
        ids = self._ids(self.instruction.text + text if instruct else text)
        if dropped := ids[limit:]:
            self._warn(text, dropped, max_sequence_length)
        ids = ids[:limit]
        return PromptTokens(ids, first_kept, min(_common_length(ids, known), first_kept))

    def tokenize_plan(self, texts: Sequence[tuple[Sequence[str], bool]], max_sequence_length: int) -> list[list[PromptTokens]]:
        """The tokens of each guidance branch's prompts; `texts` as in `Plan.texts`."""
        return [
            [self.tokenize(text, max_sequence_length=max_sequence_length, instruct=instruct) for text in prompts]
            for prompts, instruct in texts
        ]

    def encode(self, branches: Sequence[Sequence[PromptTokens]], run: RunTextEncoder) -> PromptEmbeddings:
        """Embeddings of K branches of B prompts each; equal prompts are run once, all with the same prefix in one batch."""
        outputs = self._run(dict.fromkeys(tokens for branch in branches for tokens in branch), run)
        longest = max(tokens.kept_rows for branch in branches for tokens in branch)
        shape = (len(branches), len(branches[0]), longest)
        mask = np.zeros(shape, dtype=np.float32)
        bos_row = self.instruction.bos_row.reshape(1, 1, -1)
        rows: list[Rows] = []
        for index, branch in enumerate(branches):
            for number, tokens in enumerate(branch):
                rows.append(Rows(bos_row, 0, 0, 1, (index, number, 0)))
                if tokens in outputs:
                    output, item = outputs[tokens]
                    start = tokens.first_kept - tokens.shared
                    rows.append(Rows(output, item, start, start + tokens.kept_rows - 1, (index, number, 1)))
                mask[index, number, : tokens.kept_rows] = 1.0
        return PromptEmbeddings((*shape, bos_row.size), tuple(rows), mask)

    def _run(self, prompts: Iterable[PromptTokens], run: RunTextEncoder) -> dict[PromptTokens, tuple[Any, int]]:
        """The output that holds the rows of each prompt, from the first that is not shared on, and its item there.

        A prompt of BOS alone has none.
        """
        outputs: dict[PromptTokens, tuple[Any, int]] = {}
        batches: defaultdict[int, list[PromptTokens]] = defaultdict(list)
        for tokens in prompts:
            if tokens.kept_rows > 1:
                batches[tokens.shared].append(tokens)
        for shared, batch in batches.items():
            lengths = [len(tokens.ids) - shared for tokens in batch]
            # Attention is causal: what stands in the padding after a prompt does not reach its rows.
            embeds = np.zeros((len(batch), max(lengths), self.instruction.bos_row.size), dtype=np.float32)
            for row, tokens, length in zip(embeds, batch, lengths, strict=True):
                row[:length] = self.embeddings.rows(tokens.ids[shared:])
            output = run(embeds, np.ascontiguousarray(self.instruction.prefix[..., :shared, :]))
            outputs |= {tokens: (output, item) for item, tokens in enumerate(batch)}
        return outputs

    def _ids(self, text: str) -> tuple[int, ...]:
        """All ids of `text`, BOS first."""
        ids = tuple(self.tokenizer.encode(text).ids)
        if not ids or ids[0] != self.instruction.token_ids[0]:
            raise self._error(
                "the bundle's tokenizer does not start a text with the instruction's first token",
                found=f"{ids[:3]} for {text[:20]!r}",
                wanted=f"({self.instruction.token_ids[0]}, ...)",
            )
        if max(ids) >= self.embeddings.shape[0]:
            raise self._error(
                "the bundle's tokenizer has more tokens than its embedding table",
                found=f"token {max(ids)}",
                wanted=f"less than {self.embeddings.shape[0]}",
            )
        return ids

    def _check(self) -> None:
        known, prefix = self.instruction, self.instruction.prefix
        if len(known.token_ids) < 2 or prefix.ndim != 5 or prefix.shape[3] != len(known.token_ids) - 1:
            raise self._error(
                "the bundle's instruction does not fit its stored keys and values",
                found=f"{len(known.token_ids)} tokens, prefix {prefix.shape}",
                wanted="2 or more tokens, prefix [layers, 2, heads, tokens - 1, dim]",
            )
        if known.bos_row.shape != self.embeddings.shape[1:]:
            raise self._error(
                "the bundle's instruction does not fit its embedding table",
                found=f"bos_row {known.bos_row.shape}",
                wanted=self.embeddings.shape[1:],
            )
        if self._ids(known.text) != known.token_ids:
            raise self._error(
                "the bundle's tokenizer does not belong to its stored instruction",
                found=f"{len(self._ids(known.text))} tokens for the instruction",
                wanted=f"the {len(known.token_ids)} tokens of instruction.safetensors",
            )

    def _warn(self, text: str, dropped: tuple[int, ...], max_sequence_length: int) -> None:
        cut = self.tokenizer.decode(list(dropped))
        log.warning(
            "a prompt of %d characters is longer than %d tokens: its last %d tokens are left out, which end in %r",
            len(text),
            max_sequence_length,
            len(dropped),
            cut if len(cut) <= _SHOWN else "..." + cut[-_SHOWN:],
        )

    def _error(self, message: str, **details: Any) -> ArtifactError:
        return ArtifactError(message, fix=self._fix, **details)


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many elements two sequences share at their start."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
