"""A checkpoint's tokenizer, loaded and checked."""

from __future__ import annotations

import inspect
import shlex
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.errors import ArtifactError
from sana_export.formats.recognize import not_what_was_wanted, recognize
from sana_export.variants import INDEX

if TYPE_CHECKING:
    from sana_export.checkpoint.checkpoint import SanaCheckpoint

FILE = "tokenizer/tokenizer.json"
#: The tokenizer in the format of SentencePiece, which the tokenizers library does not read.
SENTENCEPIECE = "tokenizer.model"


def complex_human_instruction() -> str:
    """The instruction that Sana's pipelines put before a prompt: the default argument of diffusers' `SanaPipeline.__call__`."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def load_tokenizer(checkpoint: SanaCheckpoint) -> Any:
    """The tokenizer, as diffusers loads it: with the class of transformers that model_index.json names.

    Raises ArtifactError if it is missing or cannot be loaded.
    """
    if not (checkpoint.folder / FILE).is_file():
        raise _missing(checkpoint)
    import transformers

    entry = checkpoint.index.get("tokenizer")
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    kind = getattr(transformers, str(name), None) if library == "transformers" else None
    tokenizers = (transformers.PreTrainedTokenizerBase, transformers.AutoTokenizer)
    if not (isinstance(kind, type) and issubclass(kind, tokenizers)):
        raise ArtifactError(
            f"{checkpoint.source} has an unsupported tokenizer",
            found=f"{INDEX} names {entry!r}",
            wanted='a tokenizer of transformers, for example ["transformers", "GemmaTokenizer"]',
            fix=f"name the tokenizer's class in {INDEX}",
        )
    folder = checkpoint.folder / "tokenizer"
    stamps = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()))
    try:
        return _load(str(name), folder, stamps)
    except Exception as error:  # whatever a class raises for files that it does not expect
        for path in sorted(folder.glob("*.json")):
            if recognize(path) is not None:
                raise not_what_was_wanted(path, "a tokenizer's file in JSON", error, fix=_replace(checkpoint)) from error
        raise ArtifactError(
            f"the tokenizer of {checkpoint.source} cannot be loaded",
            found=" ".join(f"{type(error).__name__}: {error}".split()),
            wanted=f"files that transformers' {name} loads",
            fix=_replace(checkpoint),
        ) from error


def _missing(checkpoint: SanaCheckpoint) -> ArtifactError:
    found, fix, folder = f"no {FILE}", "download the checkpoint again", checkpoint.folder / "tokenizer"
    if (folder / SENTENCEPIECE).is_file():
        found += f", but tokenizer/{SENTENCEPIECE}: the same in the format of SentencePiece"
        convert = (
            "import sys, transformers; "
            "transformers.GemmaTokenizer.from_pretrained(sys.argv[1], add_bos_token=True).save_pretrained(sys.argv[1])"
        )
        fix = f"pip install sentencepiece protobuf && {shlex.join(['python', '-c', convert, str(folder)])}"
    return ArtifactError(
        f"the tokenizer of {checkpoint.source} is missing",
        found=found,
        wanted="the tokenizer in the format of the tokenizers library",
        fix=fix,
    )


def check_tokenizer(checkpoint: SanaCheckpoint, rows: int | None) -> None:
    """Raise ArtifactError unless the tokenizer works without transformers and fits `rows` rows of embeddings (None: unknown)."""
    tokenizer = load_tokenizer(checkpoint)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArtifactError(
            f"the tokenizer of {checkpoint.source} works only in Python",
            found=type(tokenizer).__name__,
            wanted="a tokenizer of the tokenizers library",
            fix=_replace(checkpoint),
        )
    if rows is not None and len(tokenizer) > rows:
        raise ArtifactError(
            f"the tokenizer of {checkpoint.source} has more tokens than the text encoder has embeddings",
            found=f"{len(tokenizer)} tokens",
            wanted=f"{rows} or fewer (vocab_size of the text encoder)",
            fix=_replace(checkpoint),
        )
    instruction = complex_human_instruction()
    encoded = backend.encode(instruction)
    if encoded.ids != tokenizer.encode(instruction) or encoded.ids[:1] != [tokenizer.bos_token_id]:
        raise ArtifactError(
            f"{checkpoint.folder / FILE} encodes the instruction differently from the checkpoint's tokenizer",
            found=f"tokens that start with {encoded.tokens[:4]}",
            wanted=f"{tokenizer.bos_token} first, then the same token ids as {type(tokenizer).__name__}",
            fix=_replace(checkpoint),
        )


@lru_cache(maxsize=2)
def _load(name: str, folder: Path, stamps: tuple[tuple[str, int], ...]) -> Any:
    """The tokenizer in `folder`, without padding and truncation. `stamps` are the times of its files."""
    import transformers

    tokenizer = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_padding()
        backend.no_truncation()
        tokenizer.encode(complex_human_instruction())  # raises for values of other types in its config
    return tokenizer


def _replace(checkpoint: SanaCheckpoint) -> str:
    return f"replace {checkpoint.folder / 'tokenizer'} with the tokenizer of a published Sana checkpoint"
