"""API keys from the environment or a file, as the operator writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from sana_export.errors import UsageError

#: The environment variable with the keys, separated by commas or lines.
VARIABLE = "SANA_EXPORT_API_KEYS"
#: Writes a file with one key, which stays readable there.
NEW_FILE = 'echo "me:$(openssl rand -hex 24)" > api-keys'
#: Characters of a key.
_LEAST, _MOST = 16, 512


def read_keys(file: Path | None = None, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The keys of a file, or of the environment variable, by id. Empty if there are none.

    Each is "id:key". Empty lines and lines that begin with # are skipped.

    Raises UsageError for a file that cannot be read, a key without an id, a key that is too short, and an id that is repeated. No
    error shows a key or a part of one.
    """
    if file is None:
        return _parsed((os.environ if environment is None else environment).get(VARIABLE, "").replace(",", "\n"), VARIABLE)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise UsageError(f"the file of API keys {file} cannot be read", found=found, wanted="a text file") from error
    keys = _parsed(text, str(file))
    if not keys:
        raise UsageError(f"{file} has no API keys", found="an empty file", wanted="a line id:key for each key", fix=NEW_FILE)
    return keys


def _parsed(text: str, source: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        name, separator, key = line.partition(":")
        if not (separator and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name)) or name in keys:
            found = "a repeated id" if name in keys else "an id with other characters, or none"
            wanted = "id:key, the id in A-Z a-z 0-9 _ . -"
            raise UsageError(f"an API key in {source} has no id of its own", found=found, wanted=wanted, fix=NEW_FILE)
        if not (_LEAST <= len(key) <= _MOST and key.isascii() and key.isprintable() and not set(" :") & set(key)):
            raise UsageError(
                f"the API key {name} in {source} cannot be used",
                found=f"{len(key)} characters",
                wanted=f"{_LEAST} to {_MOST} printable ASCII characters without spaces and colons",
                fix=NEW_FILE,
            )
        keys[name] = key
    return keys
