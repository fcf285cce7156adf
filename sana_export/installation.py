"""How sana_export is installed, and so the command that installs more of it."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

DISTRIBUTION = "sana-export"


def install_command(*extras: str) -> str:
    """The command that installs sana_export with `extras`, from where it was installed: an index, a folder, a repository or a file.

    A source folder that is not installed is installed from there.
    """
    names = ",".join(sorted(set(filter(None, extras))))
    suffix = f"[{names}]" if names else ""
    origin = _origin()
    url, folder = str(origin.get("url", "")), origin.get("dir_info")
    if folder is not None:
        path = url2pathname(unquote(urlsplit(url).path))
        return f"pip install {'-e ' if folder.get('editable') else ''}{_quoted(path + suffix)}"
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        revision = vcs.get("requested_revision") or vcs.get("commit_id")
        url = f"{vcs['vcs']}+{url}" + (f"@{revision}" if revision else "")
    if url:
        return f"pip install {_quoted(f'{DISTRIBUTION}{suffix} @ {url}')}"
    return f"pip install {_quoted(DISTRIBUTION + suffix)}"


def _origin() -> dict[str, Any]:
    """The distribution's direct_url.json (PEP 610). Empty if it came from an index."""
    try:
        found = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):  # a source folder, or a damaged file
        found = {}
    if not isinstance(found, dict) or not found:
        folder = Path(__file__).parents[1]
        return {"url": folder.as_uri(), "dir_info": {"editable": True}} if (folder / "pyproject.toml").is_file() else {}
    return found


def _quoted(word: str) -> str:
    """`word` in double quotes if a shell needs quotes. They work in every shell; a path with a dollar sign needs other ones."""
    plain = shlex.quote(word)
    return plain if plain == word or any(sign in word for sign in '"$`\\!') else f'"{word}"'
