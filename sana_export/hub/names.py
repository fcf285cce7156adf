"""Names of repositories on the hub, and addresses of their pages."""

from __future__ import annotations

import os
import shlex
from urllib.parse import unquote, urlsplit

from sana_export.errors import UsageError

HUBS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")


def may_be_hub_id(name: str) -> bool:
    """Whether `name`, which is not that of a folder here, has the form owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def is_address(name: str) -> bool:
    """Whether `name` is an address, with or without https://. Without it, a folder here of that name comes first."""
    return "://" in name or (name.partition("/")[0].lower() in HUBS and not os.path.lexists(name))


def split_address(name: str, revision: str | None, *, wanted: str, fix: str, whole: list[str]) -> tuple[str, str | None]:
    """The hub id and the revision in the address of a page of the hub. Any other `name` is returned as it is.

    For errors: `wanted` is what may be given here, `fix` what to do about an address elsewhere, and `whole` the words of a command
    that takes a hub id, with "{repo}" and "{name}" in its places.

    Raises UsageError for any other address, and for one that names another revision than `revision`.
    """
    if not is_address(name):
        return name, revision
    try:
        address = urlsplit(name if "://" in name else f"https://{name}")
    except ValueError:  # brackets that are not those of a host
        address = urlsplit("")
    parts = [unquote(part) for part in address.path.split("/") if part]
    if address.hostname not in HUBS or len(parts) < 2 or parts[0] in ("datasets", "spaces", "collections", "papers"):
        raise UsageError(
            f"{name} is not the address of a model on the hub",
            found=f"an address at {address.hostname or 'no host'}",
            wanted=f"{wanted}, or https://huggingface.co/owner/name",
            fix=fix,
        )
    repo = "/".join(parts[:2])
    if parts[2:3] not in ([], ["tree"]) or len(parts) > 4:
        raise UsageError(
            f"{name} is a part of a repository",
            found="/".join(parts[2:]),
            wanted="the whole repository",
            fix=shlex.join(word.format(repo=repo, name=parts[1]) for word in whole),
        )
    named = parts[3] if len(parts) == 4 else None
    if named is not None and revision not in (None, named):
        raise UsageError(f"{name} and --revision name two revisions", found=f"{named} and {revision}", wanted="one of them")
    return repo, named or revision
