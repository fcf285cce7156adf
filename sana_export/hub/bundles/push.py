"""Pushes a bundle to a repository on the hub: the files that its manifest lists and a model card, in one commit."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.commands import engine_repair_command, repair_command
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.files import FileEntry
from sana_export.hub.bundles.card import FILE_NAME as CARD
from sana_export.hub.bundles.card import MARKER, MAX_BYTES, make_card, private_paths
from sana_export.hub.bundles.remote import check_names
from sana_export.hub.bundles.source import repository
from sana_export.hub.client import Hub, Repository, download, hub_errors, is_offline, look_up
from sana_export.hub.origin import origin_of
from sana_export.known_files import check_known_files, hash_always
from sana_export.manifest import FILE_NAME, Manifest
from sana_export.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from sana_export.user_paths import user_path

log = logging.getLogger(__name__)

#: Files that the hub itself, or its users, put beside a model.
_BESIDE = (".gitattributes", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    #: The repository.
    repo: str
    #: The hash of its new commit.
    commit: str
    #: The files of the commit: the bundle's, and the card if it was written.
    files: tuple[str, ...]
    #: Their bytes.
    bytes: int
    #: Files of the bundle that was there before, which the new one does not have.
    deleted: tuple[str, ...]
    #: Whether the card in the repository was kept, because somebody wrote it.
    card_kept: bool
    #: How long it took.
    seconds: float


def bundle_files(bundle: Path) -> tuple[Manifest, list[FileEntry]]:
    """The manifest of `bundle` and the files that it lists, each once, after all were compared with their hashes.

    Raises ArtifactError if a file is missing or damaged, with the command that restores it.
    """
    manifest = Manifest.load(bundle)
    check_names(bundle, manifest)
    graphs = [file for graph in manifest.graphs.values() for file in graph.files]
    with hash_always():
        check_known_files(bundle, dict.fromkeys([*manifest.files, *graphs]), fix=repair_command(bundle, manifest))
        for engine in manifest.engines:
            origin = origin_of(bundle)
            fix = origin.pull_command("--all-engines") if origin else engine_repair_command(bundle, engine.backend)
            check_known_files(bundle, [engine.file], fix=fix)
    return manifest, list({entry.path: entry for entry in manifest.entries()}.values())


def push_bundle(
    bundle: Path,
    repo: str,
    *,
    branch: str | None = None,
    private: bool = False,
    message: str | None = None,
    hub: Hub | None = None,
) -> Pushed:
    """Push `bundle` to the repository `repo`, which is made if there is none, and return what was done.

    branch: the branch to push to, which is made if there is none. None: the main one.
    private: make the repository private, if it is made. One that exists keeps its visibility.
    message: the commit's.

    Everything is one commit, so the repository has the old bundle or the new one. Large files that reached the hub before an
    interruption are not sent again. Files of the former bundle that the new one does not have are deleted; others are not touched.
    Raises ArtifactError for a damaged bundle, UsageError if the repository has something else than a bundle, and DependencyError if
    the hub cannot be reached or does not allow it.
    """
    started, hub, bundle = time.monotonic(), hub or Hub(), user_path(bundle, "the bundle")
    repo, branch = repository(repo, branch)
    if is_offline(hub):
        raise DependencyError(
            "offline mode is on, and a push needs the hub", found="--offline or HF_HUB_OFFLINE", fix="unset HF_HUB_OFFLINE"
        )
    manifest, entries = bundle_files(bundle)
    if paths := private_paths(manifest):
        log.warning("the manifest names what looks like a path of this machine: %s", ", ".join(paths))
    import huggingface_hub

    api = huggingface_hub.HfApi(token=hub.token)
    with hub_errors(repo, branch, False, (), names="write the name as owner/name", pushing=True):
        api.create_repo(repo, private=private or None, exist_ok=True)
        new_branch = branch is not None and not api.revision_exists(repo, branch)
    there = look_up(repo, None if new_branch else branch, hub)  # a new branch begins as the main one
    _check_replaceable(repo, there, hub)
    stale = sorted(_files_of_former(repo, there, hub) - {entry.path for entry in entries} - set(_BESIDE))
    card = None if _has_own_card(repo, there, hub) else make_card(repo, manifest)
    additions: list[Any] = [huggingface_hub.CommitOperationAdd(entry.path, str(bundle / entry.path)) for entry in entries]
    additions.append(huggingface_hub.CommitOperationAdd(FILE_NAME, str(bundle / FILE_NAME)))
    if card is not None:
        additions.append(huggingface_hub.CommitOperationAdd(CARD, card.encode()))
    total = sum(operation.upload_info.size for operation in additions)
    log.info("pushing %d files, %.1f MB, to %s", len(additions), total / 1e6, repo)
    with hub_errors(repo, branch, False, (), pushing=True, transfer=True):
        if branch is not None and new_branch:
            api.create_branch(repo, branch=branch, revision=there.commit)
        done = api.create_commit(
            repo,
            [*additions, *(huggingface_hub.CommitOperationDelete(path) for path in stale)],
            commit_message=message or f"Push a bundle with sana-export {manifest.tool_version}",
            revision=branch,
            parent_commit=there.commit,
        )
    names = tuple(operation.path_in_repo for operation in additions)
    return Pushed(repo, done.oid, names, total, tuple(stale), card is None, time.monotonic() - started)


def _check_replaceable(repo: str, there: Repository, hub: Hub) -> None:
    """Raise UsageError if the repository has files, but no bundle."""
    others = [name for name in there.files if name not in _BESIDE]
    if others and not _has_bundle(repo, there, hub):
        raise UsageError(
            f"{repo} holds something that is not a bundle",
            found=_some(others),
            wanted="a repository that does not exist, an empty one, or one with a bundle",
            fix=f"push to another repository, for example {repo}-bundle",
        )


def _has_bundle(repo: str, there: Repository, hub: Hub) -> bool:
    """Whether the repository has a manifest of ours, of any version. Other programs have files of that name too."""
    if FILE_NAME not in there.files or (there.files[FILE_NAME].bytes or 0) > MAX_MANIFEST_BYTES:
        return False
    try:
        document = json.loads(download(repo, FILE_NAME, there.commit, hub).read_text("utf-8"))
        return isinstance(document["format"], int) and isinstance(document["tool_version"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _files_of_former(repo: str, there: Repository, hub: Hub) -> set[str]:
    """The files in the repository that the manifest in it lists. Empty if there is none, or none that this version reads."""
    if FILE_NAME not in there.files:
        return set()
    try:
        former = Manifest.load(download(repo, FILE_NAME, there.commit, hub).parent)
    except ArtifactError as error:
        log.warning("files of the former bundle stay in %s: %s", repo, error.message)
        return set()
    return {entry.path for entry in former.entries()} & there.files.keys()


def _has_own_card(repo: str, there: Repository, hub: Hub) -> bool:
    """Whether somebody wrote the card in the repository. Then it stays."""
    if CARD not in there.files:
        return False
    if (there.files[CARD].bytes or 0) > MAX_BYTES:
        return True
    return MARKER not in download(repo, CARD, there.commit, hub).read_text("utf-8", "replace")


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
