"""Downloads a bundle's files into the hub's cache or into a folder, and checks every one of them."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sana_export.errors import ArtifactError, UsageError
from sana_export.files import FileEntry, disk_errors, file_entry, locked, manifest_lock, real_path, require_free, write_whole
from sana_export.hub.bundles.remote import RETRY_ONLINE, RemoteBundle, ask_owner, check_offered, move_revision, read_remote
from sana_export.hub.client import Hub, download
from sana_export.hub.origin import HubOrigin, origin_of
from sana_export.known_files import check_known_files
from sana_export.manifest import FILE_NAME, EngineEntry, Manifest
from sana_export.output_folder import OutputFolder
from sana_export.trt.compatibility import Host, detect_host
from sana_export.trt.selection import engines_for
from sana_export.user_paths import user_path

log = logging.getLogger(__name__)

#: The folder in which huggingface_hub keeps its notes beside files that it downloads into a folder.
_NOTES = ".cache"


@dataclass(frozen=True)
class Pulled:
    """What a pull did."""

    #: The bundle.
    folder: Path
    #: Where it came from.
    origin: HubOrigin
    #: Its manifest.
    manifest: Manifest
    #: The files that were downloaded. Others were here already.
    downloaded: tuple[FileEntry, ...]
    #: The engines that were left in the repository.
    left: tuple[EngineEntry, ...]
    #: How long it took.
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes of the downloaded files."""
        return sum(entry.bytes for entry in self.downloaded)


def pull_bundle(
    repo: str,
    output: Path | None = None,
    *,
    revision: str | None = None,
    hub: Hub | None = None,
    all_engines: bool = False,
    host: Host | None = None,
) -> Pulled:
    """Download the bundle in `repo` to the folder `output`, whole or not at all. Without `output`, into the hub's cache.

    revision: a branch, tag or commit. None: the main branch.
    all_engines: download all engines. If not, those that run on `host` (None: this machine).

    Files that are here already are kept if they have the manifest's hashes. If `output` has the same export, with engines of its
    own perhaps, it gets what it lacks. Raises UsageError if it has anything else, also at an engine's place, and for an unknown
    repository or revision; ArtifactError if the repository is not a bundle, or its files are not those of its manifest;
    DependencyError if the hub cannot be reached or refuses, or the disk is full.
    """
    started, hub = time.monotonic(), hub or Hub()
    remote = read_remote(repo, revision, hub)
    engines = wanted_engines(remote.manifest, all_engines=all_engines, host=host)
    if output is None:
        downloaded, folder, manifest = fetch_files(remote, remote.cached, engines, hub), remote.cached, remote.manifest
    else:
        folder = user_path(output, "the output folder")
        downloaded, manifest = _into_folder(remote, folder, engines, hub)
    left = tuple(entry for entry in manifest.engines if not (folder / entry.file.path).exists())
    return Pulled(folder, remote.origin, manifest, tuple(downloaded), left, time.monotonic() - started)


def wanted_engines(
    manifest: Manifest, *, all_engines: bool = False, host: Host | None = None, backend: str | None = None
) -> list[EngineEntry]:
    """The engines to download: all, or those that run on `host` (None: this machine) with `backend` (None: any)."""
    if all_engines or not manifest.engines:
        return list(manifest.engines)
    return engines_for(manifest, host or detect_host(), backend)


def fetch_files(
    remote: RemoteBundle, folder: Path, engines: Sequence[EngineEntry], hub: Hub, *, check: bool = True
) -> list[FileEntry]:
    """Download the files of `remote` that `folder` lacks: all but engines, and `engines`. Returns their entries.

    `folder` is that of the commit in the hub's cache, or any other. Files that are there are hashed (`check`), and replaced if they
    are damaged. Offline, engines that are not in the cache are left out. When the cache has all files, its revision is this commit.
    """
    entries = _wanted_files(remote, engines)
    missing = [entry for entry in entries if not (_is_intact(folder, entry) if check else _is_at(folder, entry))]
    _check_offered(remote, missing)
    require_free(folder, sum(entry.bytes for entry in missing), f"the bundle {remote.origin.repo}")
    done, total = 0, sum(entry.bytes for entry in missing)
    for number, entry in enumerate(missing, 1):
        log.info("%s (file %d of %d, %.1f of %.1f MB done)", entry.path, number, len(missing), done / 1e6, total / 1e6)
        _get(remote, folder, entry, hub)
        done += entry.bytes
    if folder == remote.cached:
        move_revision(remote)
    return missing


def needed_files(manifest: Manifest) -> list[FileEntry]:
    """The files of `manifest` that every machine needs: all but engines."""
    return [*manifest.files, *(file for graph in manifest.graphs.values() for file in graph.files)]


def _wanted_files(remote: RemoteBundle, engines: Sequence[EngineEntry]) -> list[FileEntry]:
    """The files of `remote` with those of `engines`, each once."""
    every = needed_files(remote.manifest)
    every += [engine.file for engine in engines if remote.files is not None or _is_at(remote.cached, engine.file)]
    return list({entry.path: entry for entry in every}.values())


def _get(remote: RemoteBundle, folder: Path, entry: FileEntry, hub: Hub) -> None:
    """Put the file `entry` into `folder`, with the manifest's hash."""
    origin, own = remote.origin, None if folder == remote.cached else folder
    if own is not None and _is_at(remote.cached, entry) and _is_intact(remote.cached, entry):
        target = folder / entry.path
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with (remote.cached / entry.path).open("rb") as source:
            write_whole(target, lambda file: shutil.copyfileobj(source, file, 1 << 20))
        return
    damaged = [place / entry.path for place in (remote.cached, folder) if _is_at(place, entry)]
    if remote.files is None and damaged:
        raise ArtifactError(
            f"{damaged[0]} is damaged, and offline mode is on",
            found="other content than the manifest's",
            wanted=f"sha256 {entry.sha256}",
            fix=RETRY_ONLINE,
        )
    download(origin.repo, entry.path, origin.commit, hub, folder=own, anew=(folder / entry.path).exists())
    try:
        check_known_files(folder, [entry], fix="")
    except ArtifactError as error:
        for path in (real_path(folder / entry.path), folder / entry.path):  # in the cache, also what the link points to
            path.unlink(missing_ok=True)
        raise ArtifactError(
            f"{entry.path} of {origin.repo} is not the file that its manifest lists",
            found=error.found,
            wanted=error.wanted,
            fix=ask_owner(origin),
        ) from error


def _check_offered(remote: RemoteBundle, entries: Sequence[FileEntry]) -> None:
    check_offered(remote, [entry for entry in entries if not _is_at(remote.cached, entry)])


def _is_at(folder: Path, entry: FileEntry) -> bool:
    return (folder / entry.path).is_file()


def _is_intact(folder: Path, entry: FileEntry) -> bool:
    if not _is_at(folder, entry):
        return False
    try:
        check_known_files(folder, [entry], fix="")
    except ArtifactError as error:
        log.warning("%s is downloaded again: %s", folder / entry.path, error.found)
        return False
    return True


def _into_folder(remote: RemoteBundle, output: Path, engines: Sequence[EngineEntry], hub: Hub) -> tuple[list[FileEntry], Manifest]:
    """Write the bundle to `output`, under a temporary name first, or complete the one that is there."""
    place, origin = OutputFolder.of(output), replace(remote.origin, folder=output, cache=None)
    with locked(place.lock, lambda: log.warning("another process writes %s: waiting for it", output), remove=True):
        place.restore()
        if place.folder.exists() and (not place.folder.is_dir() or place.content()):
            return _complete(remote, place.folder, engines, hub)
        _check_offered(remote, _wanted_files(remote, engines))  # before anything is written
        partial = place.partial
        if origin_of(partial) != replace(origin, folder=partial):  # what is there belongs to another pull
            shutil.rmtree(partial, ignore_errors=True)
        with disk_errors(output):
            partial.mkdir(parents=True, exist_ok=True)
            origin.save(partial)
            downloaded = fetch_files(remote, partial, engines, hub)
            write_whole(partial / FILE_NAME, (remote.cached / FILE_NAME).read_bytes())
            shutil.rmtree(partial / _NOTES, ignore_errors=True)
            place.put(last=FILE_NAME)
    return downloaded, remote.manifest


def _complete(remote: RemoteBundle, folder: Path, engines: Sequence[EngineEntry], hub: Hub) -> tuple[list[FileEntry], Manifest]:
    """Add to the bundle in `folder` what it lacks. Raises UsageError unless it is the same export."""
    found = _same_export(remote, folder)
    absent = [entry for entry in found.engines if not _is_at(folder, entry.file)]
    merged = _merged(found, remote.manifest, absent)
    for entry in merged:
        if entry not in found.engines:
            _check_free(remote, folder, entry.file)
    try:
        downloaded = fetch_files(remote, folder, [entry for entry in engines if entry in merged], hub)
    finally:
        shutil.rmtree(folder / _NOTES / "huggingface", ignore_errors=True)
    with locked(manifest_lock(folder)):
        manifest = _same_export(remote, folder)  # a build, or another export, may have written it meanwhile
        merged = _merged(manifest, remote.manifest, absent)
        if merged != manifest.engines:
            manifest = replace(manifest, engines=merged)
            manifest.save(folder)
        replace(remote.origin, folder=folder, cache=None).save(folder)
    return downloaded, manifest


def _same_export(remote: RemoteBundle, folder: Path) -> Manifest:
    """The manifest in `folder`. Raises UsageError unless it is of the same export as `remote`."""
    try:
        found = Manifest.load(folder)
        what = f"the bundle of {found.checkpoint.source} with the export key {found.export_key[:16]}"
    except ArtifactError as error:
        found, what = None, str(error.found)
    if found is not None and _export(found) == _export(remote.manifest):
        return found
    raise UsageError(
        f"{folder} is not an export of the same bundle as {remote.origin.repo}",
        found=what,
        wanted="a path that does not exist, an empty folder, or the same bundle",
        fix=f"choose another output folder with -o, for example -o {folder}-{remote.origin.commit[:8]}",
    )


def _merged(own: Manifest, remote: Manifest, absent: Sequence[EngineEntry]) -> tuple[EngineEntry, ...]:
    """The engines of both. Of two with the same identity, the own one stays, unless it is one of `absent`: its file is not here."""
    theirs = {_identity(entry): entry for entry in remote.engines}
    kept = {_identity(entry): entry for entry in own.engines if entry not in absent}
    return tuple(({_identity(entry): entry for entry in own.engines} | theirs | kept).values())


def _check_free(remote: RemoteBundle, folder: Path, entry: FileEntry) -> None:
    """Raise UsageError if something else than the file `entry` is at its place."""
    path = folder / entry.path
    if os.path.lexists(path) and not (path.is_file() and file_entry(folder, path) == entry):
        raise UsageError(
            f"{path} would be replaced by an engine of {remote.origin.repo}",
            found="a file that the manifest does not list, or another engine",
            wanted="no file of that name",
            fix=f"move it away, or choose another output folder with -o, for example -o {folder}-{remote.origin.commit[:8]}",
        )


def _identity(engine: EngineEntry) -> tuple[str, str, str]:
    return engine.graph, engine.backend, engine.key


def _export(manifest: Manifest) -> Manifest:
    """What of `manifest` an export wrote: neither engines nor a report nor the version of what wrote it last."""
    return replace(manifest, engines=(), parity=None, tool_version="")
