"""What a user may give as a bundle: a folder, or a repository on the hub."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path, PurePath

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.hub.bundles.fetch import fetch_files, needed_files, wanted_engines
from sana_export.hub.bundles.remote import RemoteBundle, read_remote
from sana_export.hub.client import Hub, is_offline
from sana_export.hub.names import is_address, may_be_hub_id, split_address
from sana_export.trt.compatibility import detect_host
from sana_export.trt.flavour import FLAVOURS
from sana_export.user_paths import user_path

log = logging.getLogger(__name__)

WANTED = "the folder of a bundle, or the hub id (owner/name) of a repository with one"


def find_bundle(
    bundle: str | os.PathLike[str],
    revision: str | None = None,
    hub: Hub | None = None,
    *,
    backend: str | None = None,
    device: int | None = None,
) -> Path:
    """The folder of a bundle. One on the hub is downloaded into huggingface_hub's cache first, with the engines that run here.

    A folder that exists is that folder, and so is every `pathlib.Path`. Any other text of the form owner/name, owner/name@revision
    or https://huggingface.co/owner/name is a repository. If the hub cannot be reached, a cached copy is used, with a warning.

    backend: download only engines of this backend. Of one without engines, none. None: any that runs here.
    device: index of the GPU that they have to run on. None: the first one.

    Raises UsageError for a revision of a folder or an unknown repository or revision, ArtifactError for what is neither a folder
    nor a repository and for a repository without a bundle, and DependencyError if the hub cannot be reached or refuses.
    """
    text = os.fspath(bundle) if isinstance(bundle, str | os.PathLike) else bundle
    if isinstance(bundle, PurePath) or not isinstance(text, str) or not is_address(text):
        folder = user_path(text, "the bundle")
        if isinstance(bundle, PurePath) or os.path.lexists(folder):
            return _a_folder(folder, revision)
    repo, revision = _split(str(text), revision, wanted=WANTED, fix="download the bundle, and give its folder")
    if not may_be_hub_id(repo):
        raise ArtifactError(
            f"{text} is not a bundle",
            found="no such folder, and not a hub id (owner/name)",
            wanted=WANTED,
            fix="check the path, or export a checkpoint first",
        )
    hub = hub or Hub()
    is_offline(hub, f"loading {repo} from the hub")
    remote = _reachable(repo, revision, hub)
    engines = []
    if remote.manifest.engines and (backend is None or backend in FLAVOURS):
        engines = wanted_engines(remote.manifest, host=detect_host(device), backend=backend)
    fetch_files(remote, remote.cached, engines, hub, check=False)  # whoever loads a file checks its hash
    return remote.cached


def repository(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The repository and the revision that a user means by `name`: owner/name, owner/name@revision, or the address of its page.

    Raises UsageError for anything else, for an address elsewhere and for two revisions.
    """
    fix = "check the name at https://huggingface.co/models"
    repo, revision = _split(name, revision, wanted="owner/name", fix=fix)
    if not may_be_hub_id(repo):
        raise UsageError(f"{name or repr(name)} is not a hub id", wanted="owner/name", fix=fix)
    return repo, revision


def _split(name: str, revision: str | None, *, wanted: str, fix: str) -> tuple[str, str | None]:
    """What stands before the revision in `name`, and the revision. Errors say what is `wanted` there, and how to `fix` it."""
    whole = ["sana-export", "pull", "{repo}", "-o", "{name}"]
    repo, revision = split_address(name, revision, wanted=wanted, fix=fix, whole=whole)
    repo, at, named = repo.partition("@")
    if at and revision not in (None, named):
        raise UsageError(f"{name} and --revision name two revisions", found=f"{named} and {revision}", wanted="one of them")
    return repo, named or revision


def _a_folder(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise UsageError(
            f"{folder} is a folder and has no revisions",
            found=f"revision {revision!r}",
            wanted="a repository on the hub, or no revision",
            fix="omit the revision, or rename the folder if you mean the repository of that name",
        )
    return folder


def _reachable(repo: str, revision: str | None, hub: Hub) -> RemoteBundle:
    """The bundle in `repo`; if the hub cannot be reached, as it is in the cache."""
    names = f"check the name, also as a path: there is no folder {repo} here"
    try:
        return read_remote(repo, revision, hub, names=names)
    except DependencyError as error:
        if is_offline(hub):
            raise
        try:
            remote = read_remote(repo, revision, replace(hub, offline=True), names=names)
        except (ArtifactError, DependencyError, UsageError):
            raise error from None
        if any(not (remote.cached / entry.path).is_file() for entry in needed_files(remote.manifest)):
            raise
        log.warning("%s: %s. The copy of %s in the cache is used", error.message, error.found, remote.origin.commit[:12])
        return remote
