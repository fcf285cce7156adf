"""Checkpoints on the Hugging Face hub: downloads what an export reads, after checking that the repository is a Sana checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_export.checkpoint.model_names import LIST_VARIANTS, not_a_checkpoint
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError, first_line
from sana_export.files import disk_errors, is_disk_error
from sana_export.formats.recognize import not_what_was_wanted
from sana_export.user_paths import user_path
from sana_export.variants import INDEX

log = logging.getLogger(__name__)

#: The largest JSON file that is read. The index of a sharded model has a megabyte or two.
MOST_JSON = 100_000_000
AGAIN = "download the checkpoint again"
#: Reads a JSON file of the checkpoint, by its path relative to the checkpoint.
ReadJson = Callable[[str], Mapping[str, Any]]
#: Chooses the files that an export reads, from the names of all files of a checkpoint.
Select = Callable[[Collection[str], ReadJson], list[str]]


@dataclass(frozen=True)
class Hub:
    """How the hub is used."""

    #: The access token. None: the one of `hf auth login` or HF_TOKEN, if any.
    token: str | None = field(default=None, repr=False)
    #: The folder of downloaded files. None: huggingface_hub's default.
    cache_dir: Path | None = None
    #: Use only files that are in the cache.
    offline: bool = False


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
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors

    offline = hub.offline or huggingface_hub.constants.HF_HUB_OFFLINE

    def read(name: str, commit: str | None = revision) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                repo, name, revision=commit, cache_dir=hub.cache_dir, token=hub.token, local_files_only=offline
            )
        )

    # huggingface_hub leaves the `~` of its default in place if there is no home folder.
    cache = user_path(hub.cache_dir or huggingface_hub.constants.HF_HUB_CACHE, "the hub's cache folder", home="HF_HOME")
    with disk_errors(cache / repo), _hub_errors(repo, revision, offline, first):
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


def fetch_file(repo: str, name: str, revision: str | None, hub: Hub) -> Path:
    """Download the file `name` of `repo` and return its path in huggingface_hub's cache. Raises the errors of `fetch`."""
    import huggingface_hub
    import huggingface_hub.constants

    offline = hub.offline or huggingface_hub.constants.HF_HUB_OFFLINE
    cache = user_path(hub.cache_dir or huggingface_hub.constants.HF_HUB_CACHE, "the hub's cache folder", home="HF_HOME")
    with disk_errors(cache / repo), _hub_errors(repo, revision, offline, (name,)):
        return Path(
            huggingface_hub.hf_hub_download(
                repo, name, revision=revision, cache_dir=hub.cache_dir, token=hub.token, local_files_only=offline
            )
        )


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


@dataclass(frozen=True)
class _Refusal:
    """The error to raise for one of huggingface_hub's. Its texts may contain {repo}, {revision} and {first}."""

    #: Its class.
    kind: type[SanaExportError]
    #: Its message.
    message: str
    #: What was wanted.
    wanted: str
    #: How to fix it.
    fix: str
    #: What was found. None: the text of huggingface_hub's error.
    found: str | None = None


_OFFLINE = _Refusal(
    DependencyError,
    "{repo} is not in the cache, and offline mode is on",
    "a cached copy of {first} at this revision",
    "run the same command once without --offline (and without HF_HUB_OFFLINE), or pass the --cache-dir that contains it",
    found="no such file in the cache",
)
_UNREACHABLE = _Refusal(
    DependencyError,
    "the hub cannot be reached for {repo}",
    "a connection to the hub",
    "check the network and HF_ENDPOINT, add --offline if the checkpoint is cached, or use a local folder",
)
#: By the name of huggingface_hub's class, subclasses first.
_REFUSALS = {
    "GatedRepoError": _Refusal(
        DependencyError,
        "{repo} is gated: only accounts that accepted its terms may download it",
        "the token of such an account",
        "accept the terms at https://huggingface.co/{repo}, then pass --token or run `hf auth login`",
        found="no token, or one without access",
    ),
    "RevisionNotFoundError": _Refusal(
        UsageError,
        "{repo} has no revision {revision!r}",
        "a branch, tag or commit of it",
        "omit --revision, or use one listed at https://huggingface.co/{repo}/commits/main",
        found="revision not found",
    ),
    "RepositoryNotFoundError": _Refusal(
        UsageError,
        "the hub has no repository {repo}, or it is private",
        "a hub id (owner/name) that the token may read",
        "sana-export variants  (lists the published checkpoints); for a private one pass --token or run `hf auth login`",
        found="repository not found",
    ),
    "HFValidationError": _Refusal(
        UsageError, "{repo!r} is not a hub id", "owner/name", "sana-export variants  (lists the published checkpoints)"
    ),
    "HfHubHTTPError": _Refusal(
        DependencyError,
        "the hub refused to send {repo}",
        "access to the repository",
        "try again later; for private or gated files pass --token or run `hf auth login`",
    ),
}


@contextmanager
def _hub_errors(repo: str, revision: str | None, offline: bool, first: Sequence[str]) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours. `first` are the files that `fetch` asks for first. Disk errors pass through."""
    from huggingface_hub import errors

    names = ("HFValidationError", "EntryNotFoundError", "XetDownloadError", "FileMetadataError")
    # HfHubHTTPError's bases are OSError and the error class of the HTTP client, which differs between versions.
    kinds = (*errors.HfHubHTTPError.__bases__, *(getattr(errors, name) for name in names if hasattr(errors, name)))
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and is_disk_error(error):
            raise
        ancestors = [kind.__name__ for kind in type(error).__mro__]
        refusal = next((row for name, row in _REFUSALS.items() if name in ancestors), _OFFLINE if offline else _UNREACHABLE)
        cause = error.__cause__ if "LocalEntryNotFoundError" in ancestors and error.__cause__ else error
        texts = {"repo": repo, "revision": revision, "first": " or ".join(first)}
        raise refusal.kind(
            refusal.message.format(**texts),
            found=refusal.found or first_line(cause),
            wanted=refusal.wanted.format(**texts),
            fix=refusal.fix.format(**texts),
        ) from error
