"""Checkpoints on the Hugging Face hub: fetch what an export reads, and nothing before it is known to be a Sana."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.files import disk_errors

log = logging.getLogger(__name__)

INDEX = "model_index.json"
#: Reads a JSON file of the checkpoint by its path inside it.
ReadJson = Callable[[str], Mapping[str, Any]]
#: What an export reads of a checkpoint, out of the names of all its files.
Select = Callable[[Collection[str], ReadJson], list[str]]


@dataclass(frozen=True)
class Hub:
    """How the hub may be asked: `token` None is what `hf auth login` or HF_TOKEN left, `cache_dir` None huggingface_hub's own."""

    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    offline: bool = False


def fetch(repo: str, revision: str | None, hub: Hub, check_index: Callable[[Mapping[str, Any]], None], select: Select) -> Path:
    """The folder of `repo` in huggingface_hub's cache with the files that `select` names, all of one commit.

    model_index.json comes first and alone: `check_index` refuses another pipeline before anything else is downloaded. Raises
    UsageError for an unknown repository or revision, ArtifactError for one that is not a diffusers checkpoint, DependencyError
    where the hub is out of reach, refuses, or is not to be asked and the cache does not hold it all.
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

    cache = Path(hub.cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
    with disk_errors(cache / repo), _hub_errors(repo, revision, offline):
        try:
            index = read(INDEX)
        except huggingface_hub.errors.RemoteEntryNotFoundError as error:
            names = huggingface_hub.list_repo_files(repo, revision=revision, token=hub.token)
            raise not_a_checkpoint(repo, names, lambda name: read_json(read(name))) from error
        check_index(read_json(index))
        folder, commit = index.parent, index.parent.name
        if offline:
            return _cached(repo, folder, select)
        names = huggingface_hub.list_repo_files(repo, revision=commit, token=hub.token)
        wanted = select(names, lambda name: read_json(read(name, commit)))
        log.info("%d of %d files of %s are needed", len(wanted), len(names), repo)
        huggingface_hub.snapshot_download(repo, revision=commit, cache_dir=hub.cache_dir, token=hub.token, allow_patterns=wanted)
        return folder


def not_a_checkpoint(source: str, names: Collection[str], read_json: ReadJson) -> ArtifactError:
    """The error for a folder or repository without model_index.json, which says what it holds instead."""
    found = f"no {INDEX}"
    if "config.json" in names and (kind := read_json("config.json").get("_class_name")):
        found += f", and a config.json of {kind}"
    elif pickles := sorted(name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".bin"))):
        found += f", but {pickles[0]}"
    return ArtifactError(
        f"{source} is not a diffusers checkpoint",
        found=found,
        wanted="a folder that SanaPipeline.from_pretrained loads",
        fix="sana-export variants  (lists the published checkpoints)",
    )


def _cached(repo: str, folder: Path, select: Select) -> Path:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        select(names, lambda name: read_json(folder / name))
    except ArtifactError as error:
        raise DependencyError(
            f"{repo} is not whole in the cache, and the hub is not to be asked",
            found=f"{error.message}: {error.found}",
            wanted="every file that the export reads",
            fix="run the same command once without --offline (and without HF_HUB_OFFLINE)",
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ArtifactError where there is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing", found="no such file", wanted="a config in JSON") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged", found=str(error), wanted="a config in JSON") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged", found=type(content).__name__, wanted="a JSON object")
    return content


@dataclass(frozen=True)
class _Refusal:
    """The user's error for one of huggingface_hub's. The texts may name {repo} and {revision}; `found` None is its own words."""

    kind: type[SanaExportError]
    message: str
    wanted: str
    fix: str
    found: str | None = None


_OFFLINE = _Refusal(
    DependencyError,
    "{repo} is not in the cache, and the hub is not to be asked",
    "a cached copy of model_index.json at this revision",
    "run the same command once without --offline (and without HF_HUB_OFFLINE), or name the --cache-dir that holds it",
    found="no such file in the cache",
)
_UNREACHABLE = _Refusal(
    DependencyError,
    "the hub cannot be reached for {repo}",
    "a connection to the hub",
    "check the network and HF_ENDPOINT, add --offline if the checkpoint is cached, or name a local folder",
)
#: By the name of huggingface_hub's class, the most special first.
_REFUSALS = {
    "GatedRepoError": _Refusal(
        DependencyError,
        "{repo} is gated: its owner gives it only to accounts that accepted its terms",
        "the token of such an account",
        "accept the terms at https://huggingface.co/{repo}, then pass --token or run `hf auth login`",
        found="no token, or one without access",
    ),
    "RevisionNotFoundError": _Refusal(
        UsageError,
        "{repo} has no revision {revision!r}",
        "a branch, tag or commit of it",
        "leave out --revision, or take one listed at https://huggingface.co/{repo}/commits/main",
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
def _hub_errors(repo: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Turn what huggingface_hub raises into the user's errors. Failures of the disk pass through."""
    from huggingface_hub import errors

    names = ("HFValidationError", "EntryNotFoundError", "XetDownloadError", "FileMetadataError")
    # The bases of HfHubHTTPError are those of the HTTP client, which differs between versions, and OSError.
    kinds = (*errors.HfHubHTTPError.__bases__, *(getattr(errors, name) for name in names if hasattr(errors, name)))
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        ancestors = [kind.__name__ for kind in type(error).__mro__]
        refusal = next((row for name, row in _REFUSALS.items() if name in ancestors), _OFFLINE if offline else _UNREACHABLE)
        cause = error.__cause__ if "LocalEntryNotFoundError" in ancestors and error.__cause__ else error
        texts = {"repo": repo, "revision": revision}
        raise refusal.kind(
            refusal.message.format(**texts),
            found=refusal.found or (str(cause).strip().splitlines() or [type(cause).__name__])[0],
            wanted=refusal.wanted,
            fix=refusal.fix.format(**texts),
        ) from error


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
