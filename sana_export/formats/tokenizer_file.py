"""Reads tokenizer.json, the format of the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from sana_export.formats.recognize import not_what_was_wanted

#: The largest file. Gemma's has 34 MB.
MOST_BYTES = 500_000_000


def read_tokenizer(path: Path, *, fix: str | None = None) -> Tokenizer:
    """The tokenizer in `path`. Raises ArtifactError, with `fix` as the advice, if it is damaged or something else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        text = path.read_text("utf-8")
        if not isinstance(json.loads(text).get("model"), dict):
            raise ValueError("no model")
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception, and its panics are not even that
        found = " ".join(str(error).split())[:200]
        raise not_what_was_wanted(path, "a tokenizer of the tokenizers library", found, fix=fix) from error
