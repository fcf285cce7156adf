"""Text to prompt embeddings: tokens, their rows of the embedding table, and no more rows of the text encoder than are needed.

The reference is `_get_gemma_prompt_embeds` and `encode_prompt` of diffusers' SanaPipeline. It encodes every prompt after the
instruction, padded to full length, and keeps row 0 (BOS) and all rows from the instruction's last token on. Gemma-2 is causal, so
the rows that a prompt shares with the instruction are the same for every prompt. The bundle stores their keys and values. Only the
rows from the first token that differs are computed, without padding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import SAFETENSORS_WEIGHT_DTYPES
from sana_export.formats.safetensors_file import TensorFile
from sana_export.formats.tokenizer_file import read_tokenizer
from sana_export.known_files import check_known_files
from sana_export.manifest import Manifest
from sana_export.quantization.layers import EMBEDDINGS
from sana_export.runtime.embedding_table import ROWS, SCALES, EmbeddingTable
from sana_export.runtime.embeddings_cache import EmbeddingsCache
from sana_export.runtime.unpicklable import OfThisProcess

log = logging.getLogger(__name__)

#: The files of a bundle that turn a prompt into the text encoder's input.
_FILES = ("tokenizer/tokenizer.json", "instruction.safetensors", "embeddings.safetensors")

#: From inputs_embeds [1, S, C] and prefix [layers, 2, kv_heads, P, head_dim], float32 on the host, to prompt_embeds [1, S, C], a
#: tensor of a backend. The prefix may be a view.
RunTextEncoder = Callable[[Float32, Float32], Any]

#: The most tokens of one text. The text encoder's graph has no sliding attention windows, which could matter for longer texts.
MAX_TOKENS = 2048
#: The warning about a truncated prompt shows this many characters of its end.
_SHOWN = 80


@dataclass(frozen=True, eq=False)
class Instruction:
    """The instruction of n tokens, and what the bundle stores for it."""

    #: Its lines, joined with newlines.
    text: str
    #: n ids; the first is BOS.
    token_ids: tuple[int, ...]
    #: float32 [layers, 2, kv_heads, n - 1, head_dim]: keys and values of all tokens but the last.
    prefix: Float32
    #: float32 [C]: the text encoder's output at BOS.
    bos_row: Float32


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the text encoder reads it."""

    #: BOS first, and the instruction's if the prompt follows it.
    ids: tuple[int, ...]
    #: The denoiser gets row 0 and the rows from this one to the end of `ids`.
    first_kept: int
    #: The first `shared` ids are the instruction's; 1 <= shared <= first_kept.
    shared: int
    #: The most ids that a prompt of the same request may have.
    limit: int

    @property
    def kept_rows(self) -> int:
        """Rows that the denoiser gets."""
        return 1 + max(len(self.ids) - self.first_kept, 0)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one prompt, and their place in prompt_embeds [U, B, L, C]."""

    #: [n, S, C]: a tensor of a backend, or an array.
    source: Any
    #: Index into the first axis of `source`.
    item: int
    #: First row in the item.
    start: int
    #: The row after the last one.
    stop: int
    #: Branch, number in the batch, and first row in prompt_embeds.
    place: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class GivenEmbeddings:
    """What the caller gave in place of B prompts."""

    #: float32 [B, L, C].
    embeds: Float32
    #: float32 [B, L]: 1 for the rows of a prompt.
    mask: Float32


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """prompt_embeds as the rows that it is assembled from; all other rows are zero.

    The text encoder's outputs stay on the device until the backend copies their rows.
    """

    #: (U, B, L, C).
    shape: tuple[int, int, int, int]
    rows: tuple[Rows, ...]
    #: float32 [U, B, L]: 1 for the rows of a prompt.
    context_mask: Float32

    @property
    def sources(self) -> dict[int, Any]:
        """The distinct sources of the rows, by their `id`."""
        return {id(rows.source): rows.source for rows in self.rows}

    def gather(self, to_host: Callable[[Any], Any] = np.asarray) -> Float32:
        """prompt_embeds float32 [U, B, L, C] on the host."""
        embeds = np.zeros(self.shape, dtype=np.float32)
        sources = {key: to_host(source) for key, source in self.sources.items()}
        for rows in self.rows:
            branch, number, first = rows.place
            values = sources[id(rows.source)][rows.item, rows.start : rows.stop]
            embeds[branch, number, first : first + len(values)] = values
        return embeds

    def repeated(self, count: int) -> PromptEmbeddings:
        """Each prompt `count` times in a row."""
        branches, batch, length, channels = self.shape
        rows = [
            replace(rows, place=(rows.place[0], rows.place[1] * count + copy, rows.place[2]))
            for rows in self.rows
            for copy in range(count)
        ]
        return PromptEmbeddings(
            (branches, batch * count, length, channels), tuple(rows), np.repeat(self.context_mask, count, axis=1)
        )

    def only(self, branch: int) -> PromptEmbeddings:
        """The embeddings of one branch, with the same L."""
        rows = [replace(rows, place=(0, *rows.place[1:])) for rows in self.rows if rows.place[0] == branch]
        return PromptEmbeddings((1, *self.shape[1:]), tuple(rows), self.context_mask[branch : branch + 1])

    def padded(self, multiple: int, most: int) -> PromptEmbeddings:
        """With L padded to a multiple of `multiple`, but not beyond `most`. The padding is masked, so this is exact."""
        branches, batch, length, channels = self.shape
        longer = _padded_length(length, multiple, most)
        mask = np.zeros((branches, batch, longer), dtype=np.float32)
        mask[..., :length] = self.context_mask
        return PromptEmbeddings((branches, batch, longer, channels), self.rows, mask)


class PromptEncoder(OfThisProcess):
    """Encodes prompts with a tokenizer, the stored instruction and the token embedding table [vocabulary, C].

    Raises ArtifactError if these do not belong together. `fix` is the command that fixes the bundle then.
    """

    def __init__(
        self, tokenizer: Tokenizer, instruction: Instruction, embeddings: EmbeddingTable, *, fix: str | None = None
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.instruction, self.embeddings, self._fix = tokenizer, instruction, embeddings, fix
        self._check()

    @classmethod
    def load(cls, bundle: Path, manifest: Manifest, *, fix: str | None = None) -> PromptEncoder:
        """The encoder of a bundle, from its files tokenizer/, instruction.safetensors and embeddings.safetensors."""
        entries = [manifest.entry(bundle, name) for name in _FILES]
        tokenizer, instruction, embeddings = check_known_files(bundle, entries, fix=fix or "")
        stored = TensorFile(instruction, fix=fix)
        token_ids, prefix, bos_row = (stored[name] for name in ("token_ids", "prefix", "bos_row"))
        rows, quantized = TensorFile(embeddings, fix=fix), EMBEDDINGS in manifest.options.quantize
        table = EmbeddingTable(rows[ROWS], rows[SCALES] if quantized else None)
        for name, tensor, dimensions, dtypes in (
            ("token_ids", token_ids, 1, ("I64",)),
            ("prefix", prefix, 5, ("F32",)),
            ("bos_row", bos_row, 1, ("F32",)),
            (ROWS, table.values, 2, ("I8",) if quantized else SAFETENSORS_WEIGHT_DTYPES),
            *([(SCALES, table.scales, 1, ("F32",))] if table.scales is not None else []),
        ):
            if len(tensor.shape) != dimensions or tensor.dtype not in dtypes:
                raise ArtifactError(
                    f"{bundle} is damaged: {name} is not what a prompt needs",
                    found=f"{tensor.dtype} {list(tensor.shape)}",
                    wanted=f"{' or '.join(dtypes)} with {dimensions} dimensions",
                    fix=fix,
                )
        known = Instruction(manifest.model.instruction, tuple(token_ids.read().tolist()), prefix.read(), bos_row.read())
        return cls(read_tokenizer(tokenizer, fix=fix), known, table, fix=fix)

    def tokenize(self, text: str, *, max_sequence_length: int, instruction: str = "") -> PromptTokens:
        """The tokens of `text` after `instruction`. A prompt of more than `max_sequence_length` rows is truncated.

        Logs a warning for a truncated prompt. Raises UsageError if the limit allows more than `MAX_TOKENS` tokens.
        """
        known = self.instruction.token_ids
        first_kept = self._first_kept(instruction)
        limit = first_kept + max_sequence_length - 1
        if limit > MAX_TOKENS:
            raise UsageError(
                "max_sequence_length is too large" if first_kept < MAX_TOKENS else "complex_human_instruction is too long",
                found=max_sequence_length if first_kept < MAX_TOKENS else f"{first_kept + 1} tokens",
                wanted=f"1 to {MAX_TOKENS - first_kept + 1}" if first_kept < MAX_TOKENS else f"at most {MAX_TOKENS}",
            )
        text = text.lower().strip()
        ids = self._ids(instruction + text)
        if dropped := ids[limit:]:
            self._warn(text, dropped, max_sequence_length)
        ids = ids[:limit]
        return PromptTokens(ids, first_kept, min(common_length(ids, known), first_kept), limit)

    def tokenize_plan(self, texts: Sequence[tuple[Sequence[str], str]], max_sequence_length: int) -> list[list[PromptTokens]]:
        """The tokens of each branch's prompts; `texts` as in `Plan.texts`."""
        return [
            [self.tokenize(text, max_sequence_length=max_sequence_length, instruction=instruction) for text in prompts]
            for prompts, instruction in texts
        ]

    def encode(
        self,
        branches: Sequence[Sequence[PromptTokens]],
        run: RunTextEncoder,
        multiple: int = 1,
        given: Mapping[int, GivenEmbeddings] = MappingProxyType({}),
        cache: EmbeddingsCache | None = None,
    ) -> PromptEmbeddings:
        """Embeddings of U branches of B prompts each. Every prompt runs alone, equal ones once, those in `cache` not at all.

        So the bits of a prompt's rows do not depend on the other prompts. In one batch they may: a backend may choose another
        kernel for another number of rows.

        A prompt's tokens are padded to a multiple of `multiple`, so that shapes repeat. The padding's rows are not used. The
        branches in `given`, by number, have no tokens.
        """
        cache = EmbeddingsCache() if cache is None else cache
        outputs = {tokens: self._run(tokens, run, multiple, cache) for tokens in needed(branches)}
        longest = max(
            *(tokens.kept_rows for branch in branches for tokens in branch),
            *(values.embeds.shape[1] for values in given.values()),
            1,
        )
        shape = (len(branches), len(given[0].embeds) if 0 in given else len(branches[0]), longest)
        mask = np.zeros(shape, dtype=np.float32)
        bos_row = self.instruction.bos_row.reshape(1, 1, -1)
        rows: list[Rows] = []
        for index, branch in enumerate(branches):
            if index in given:
                count, length = given[index].mask.shape
                rows += [Rows(given[index].embeds, item, 0, length, (index, item, 0)) for item in range(count)]
                mask[index, :, :length] = given[index].mask
                continue
            for number, tokens in enumerate(branch):
                rows.append(Rows(bos_row, 0, 0, 1, (index, number, 0)))
                if tokens in outputs:
                    start = tokens.first_kept - tokens.shared
                    rows.append(Rows(outputs[tokens], 0, start, start + tokens.kept_rows - 1, (index, number, 1)))
                mask[index, number, : tokens.kept_rows] = 1.0
        return PromptEmbeddings((*shape, bos_row.size), tuple(rows), mask)

    def _run(self, tokens: PromptTokens, run: RunTextEncoder, multiple: int, cache: EmbeddingsCache) -> Any:
        """The output [1, S, C] with the rows of a prompt, from the first that is not shared."""
        if (known := cache.get(tokens)) is not None:
            return known
        length = len(tokens.ids) - tokens.shared
        # Attention is causal: the padding after a prompt does not reach its rows.
        padded = _padded_length(length, multiple, tokens.limit - tokens.shared)
        embeds = np.zeros((1, padded, self.instruction.bos_row.size), dtype=np.float32)
        embeds[0, :length] = self.embeddings.rows(tokens.ids[tokens.shared :])
        output = run(embeds, self.instruction.prefix[..., : tokens.shared, :])
        cache.put(tokens, output, embeds.nbytes)
        return output

    def _first_kept(self, instruction: str) -> int:
        """`PromptTokens.first_kept` of a prompt after `instruction`."""
        if not instruction:
            return 1
        count = len(self.instruction.token_ids if instruction == self.instruction.text else self._ids(instruction))
        if count < 2:
            raise UsageError("complex_human_instruction has no token", found=repr(instruction), wanted="a line of text, or None")
        return count - 1

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
                "the bundle's instruction does not match its stored keys and values",
                found=f"{len(known.token_ids)} tokens, prefix {prefix.shape}",
                wanted="2 or more tokens, prefix [layers, 2, heads, tokens - 1, dim]",
            )
        if (scales := self.embeddings.scales) is not None and scales.shape != self.embeddings.shape[:1]:
            raise self._error(
                "the bundle's embedding table does not match its scales",
                found=f"{scales.shape[0]} scales",
                wanted=f"{self.embeddings.shape[0]} scales, one for each row",
            )
        if known.bos_row.shape != self.embeddings.shape[1:]:
            raise self._error(
                "the bundle's instruction does not match its embedding table",
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
            "a prompt of %d characters is longer than %d tokens: its last %d tokens are dropped, which end in %r",
            len(text),
            max_sequence_length,
            len(dropped),
            cut if len(cut) <= _SHOWN else "..." + cut[-_SHOWN:],
        )

    def _error(self, message: str, **details: Any) -> ArtifactError:
        return ArtifactError(message, fix=self._fix, **details)


def needed(branches: Sequence[Sequence[PromptTokens]]) -> list[PromptTokens]:
    """The different prompts that the text encoder has to read. A prompt of BOS alone needs no run."""
    return [*dict.fromkeys(tokens for branch in branches for tokens in branch if tokens.kept_rows > 1)]


def _padded_length(length: int, multiple: int, most: int) -> int:
    """`length`, or the next multiple of `multiple`, but not beyond `most`."""
    return max(length, min(-(-length // multiple) * multiple, most))


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many of their first elements two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
