"""Checkpoints on the Hugging Face hub: downloads what an export reads, after checking that the repository is a Sana checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_export.checkpoint.model_names import not_a_checkpoint
from sana_export.errors import ArtifactError, DependencyError
from sana_export.files import disk_errors
from sana_export.formats.recognize import not_what_was_wanted
from sana_export.hub.client import LIST_VARIANTS, Hub, cache_of, hub_errors, is_offline
from sana_export.variants import INDEX

log = logging.getLogger(__name__)

#: The largest JSON file that is read. The index of a sharded model has a megabyte or two.
MOST_JSON = 100_000_000
AGAIN = "download the checkpoint again"
#: Reads a JSON file of the checkpoint, by its path relative to the checkpoint.
ReadJson = Callable[[str], Mapping[str, Any]]
#: Chooses the files that an export reads, from the names of all files of a checkpoint.
Select = Callable[[Collection[str], ReadJson], list[str]]


def fetch(
    repo: str,
    revision: str | None,
    hub: Hub,
    check_index: Callable[[Mapping[str, Any]], None],
    select: Select,
    *,
    check_configs: Callable[[Mapping[str, Any], ReadJson], None] = lambda index, read: None,
    first: Sequence[str] = (INDEX,),
) -> Path:
    """Download the files of `repo` that `select` chooses, all of one commit, and return their folder in huggingface_hub's cache.

    The first of the files `first` that exists is downloaded before all others, so that `check_index` can refuse its content. Then
    come the configs, so that `check_configs` can refuse them before any weights are downloaded. Raises UsageError for an unknown
    repository or revision, ArtifactError if it is not a diffusers checkpoint, and DependencyError if the hub cannot be reached or
    refuses, or if offline mode is on and a file is not in the cache.
    """
    offline = is_offline(hub)
    import huggingface_hub
    import huggingface_hub.errors

    def read(name: str, commit: str | None = revision) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                repo, name, revision=commit, cache_dir=hub.cache_dir, token=hub.token, local_files_only=offline
            )
        )

    with disk_errors(cache_of(hub) / repo), hub_errors(repo, revision, offline, first):
        missing = (huggingface_hub.errors.RemoteEntryNotFoundError, huggingface_hub.errors.LocalEntryNotFoundError)
        for name in first[:-1]:
            with contextlib.suppress(*missing):
                index = read(name)
                break
        else:
            name = first[-1]
            try:
                index = read(name)
            except huggingface_hub.errors.RemoteEntryNotFoundError as error:
                names = huggingface_hub.list_repo_files(repo, revision=revision, token=hub.token)
                raise not_a_checkpoint(repo, names, lambda name: read_json(read(name)), wanted=first) from error
        content = read_json(index)
        check_index(content)
        folder = index.parents[name.count("/")]
        commit = folder.name
        if offline:
            return _cached(repo, folder, select)
        names = huggingface_hub.list_repo_files(repo, revision=commit, token=hub.token)

        def read_config(name: str) -> Mapping[str, Any]:
            if name not in names:
                raise ArtifactError(
                    f"{name} of {repo} is missing", found="no such file", wanted="a config in JSON", fix=LIST_VARIANTS
                )
            return read_json(read(name, commit))

        check_configs(content, read_config)
        wanted = select(names, read_config)
        log.info("%d of %d files of %s are needed", len(wanted), len(names), repo)
        huggingface_hub.snapshot_download(repo, revision=commit, cache_dir=hub.cache_dir, token=hub.token, allow_patterns=wanted)
        return folder


def _cached(repo: str, folder: Path, select: Select) -> Path:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        select(names, lambda name: read_json(folder / name))
    except ArtifactError as error:
        raise DependencyError(
            f"{repo} is incomplete in the cache, and offline mode is on",
            found=f"{error.message}: {error.found}",
            wanted="every file that the export reads",
            fix="run the same command once without --offline (and without HF_HUB_OFFLINE)",
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ArtifactError if there is none."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing", found="no such file", wanted="a config in JSON", fix=AGAIN) from error
    except (OSError, ValueError, RecursionError) as error:  # a folder, not JSON, not UTF-8
        raise not_what_was_wanted(path, "a config in JSON", error, fix="download the checkpoint again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged", found=type(content).__name__, wanted="a JSON object", fix=AGAIN)
    return content
