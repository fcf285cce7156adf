"""A bundle in a repository: its manifest, and what is checked before anything large is downloaded."""

from __future__ import annotations

import logging
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sana_export.errors import ArtifactError
from sana_export.files import FileEntry, disk_errors, write_whole
from sana_export.hub.client import MAIN, Hub, RepositoryFile, download, is_offline, look_up
from sana_export.hub.origin import FILE_NAME as ORIGIN
from sana_export.hub.origin import HubOrigin
from sana_export.manifest import FILE_NAME, MAX_BYTES, Manifest
from sana_export.user_paths import MOST_NAME_BYTES
from sana_export.variants import INDEX

log = logging.getLogger(__name__)

#: What some system does not take in the name of a file.
_NOT_PORTABLE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
#: Names of devices on Windows, with any suffix.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\.|$)", re.IGNORECASE)
#: The suffix of compiled kernels and a backend's folder of them. No manifest lists them.
_KERNELS, _KERNEL_FOLDER = ".cache", "engines/onnxruntime-tensorrt-rtx/"
#: What to do about a file in the cache that is damaged.
RETRY_ONLINE = "run the same command once without --offline (and without HF_HUB_OFFLINE), or use another --cache-dir"
#: Files of a repository with a LoRA, as diffusers and PEFT name them.
_LORAS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
_PICKLES = (".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class RemoteBundle:
    """A bundle in a repository at one commit."""

    #: Where it is.
    origin: HubOrigin
    #: Its manifest.
    manifest: Manifest
    #: The folder of the commit in the hub's cache. It has the manifest, and what was downloaded before.
    cached: Path
    #: What the repository contains. None: the hub was not contacted.
    files: Mapping[str, RepositoryFile] | None
    #: The branch, tag or commit that it was asked for.
    revision: str = MAIN


def read_remote(repo: str, revision: str | None, hub: Hub, *, names: str | None = None) -> RemoteBundle:
    """Download and check the manifest of the bundle in `repo`. `names`: what to check if there is no such repository, for an error.

    Offline, it comes from the cache. Raises UsageError for an unknown repository or revision, ArtifactError for a repository
    without a bundle and for a manifest that is damaged, unsafe or of another version, and DependencyError if the hub cannot be
    reached or refuses.
    """
    names = names or f"check the name at https://huggingface.co/{repo.partition('/')[0]}"
    listing = None
    if not is_offline(hub):
        listing = look_up(repo, revision, hub, names=names)
        _check_manifest_file(repo, listing.files)
    # By its commit, which leaves the cache's revision where it is until all files are here (`move_revision`).
    folder = download(repo, FILE_NAME, revision if listing is None else listing.commit, hub, names=names).parent
    try:
        manifest = Manifest.load(folder)
    except ArtifactError as error:
        if listing is None:
            raise _named(error, repo, folder, RETRY_ONLINE) from error
        download(repo, FILE_NAME, folder.name, hub, anew=True, names=names)  # the copy in the cache may be what is damaged
        try:
            manifest = Manifest.load(folder)
        except ArtifactError as again:
            raise _named(again, repo, folder) from again
    check_names(repo, manifest)
    origin = HubOrigin(repo, folder.name, cache=folder.parents[2])
    return RemoteBundle(origin, manifest, folder, None if listing is None else listing.files, revision or MAIN)


def move_revision(remote: RemoteBundle) -> None:
    """Let the revision that `remote` was asked for mean its commit when the hub is not contacted, as huggingface_hub does.

    Call it when all files of the commit are in the cache: until then, the revision means the former commit, which is complete.
    """
    commit, path = remote.origin.commit, remote.cached.parents[1] / "refs" / remote.revision
    if remote.files is None or remote.revision == commit or (path.is_file() and path.read_text("utf-8") == commit):
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, commit)


def check_names(source: object, manifest: Manifest) -> None:
    """Raise ArtifactError unless the manifest's files have names that every system takes, each for one file.

    Hidden files are refused too: no other program finds a configuration of its own in a bundle. So are compiled kernels, which are
    used without a hash, and engines whose names are not those of engines. `source`: what errors call it.
    """
    entries: dict[str, FileEntry] = {FILE_NAME: FileEntry(FILE_NAME, "", 0), ORIGIN: FileEntry(ORIGIN, "", 0)}
    folders: dict[str, str] = {}
    for entry in manifest.entries():
        if not _is_portable(entry.path):
            raise _unsafe(source, f"{entry.path!r:.200}", "names of letters, digits, dots, dashes and underscores, none hidden")
        key = _any_spelling(entry.path)
        if key.endswith(_KERNELS) or key.startswith(_KERNEL_FOLDER):
            raise _unsafe(source, f"{entry.path}, which is a place of compiled kernels", "files that an export or a build wrote")
        if entries.setdefault(key, entry) != entry:
            raise _unsafe(source, f"{entry.path} twice, or in two spellings", "each file once")
        for parent in PurePosixPath(entry.path).parents:
            if folders.setdefault(_any_spelling(parent.as_posix()), parent.as_posix()) != parent.as_posix():
                raise _unsafe(source, f"the folder {parent} in two spellings", "one spelling")
    if both := folders.keys() & entries.keys():
        raise _unsafe(source, f"{min(both)} as a file and as a folder", "one of them")
    for engine in manifest.engines:
        first, *others = PurePosixPath(engine.file.path).parts
        if first != "engines" or len(others) < 3 or (others[0], others[-1]) != (engine.backend, f"{engine.graph}.engine"):
            raise _unsafe(source, f"the engine {engine.file.path}", f"engines/{engine.backend}/.../{engine.graph}.engine")


def _is_portable(path: str) -> bool:
    """Whether every system takes the path, and none of its names is hidden."""
    parts = PurePosixPath(path).parts
    odd = (
        part.startswith(".") or part.endswith((".", " ")) or _DEVICE.match(part) or len(part.encode()) > MOST_NAME_BYTES
        for part in parts
    )
    return path == "/".join(parts) and path.isprintable() and not _NOT_PORTABLE.search(path) and not any(odd)


def _any_spelling(path: str) -> str:
    """The same text for all paths that some system takes for one: in other case, or with other code points for one character."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def check_offered(remote: RemoteBundle, entries: Iterable[FileEntry]) -> None:
    """Raise ArtifactError unless the repository has each of `entries`, with the manifest's size and hash as far as the hub says."""
    for entry in entries:
        found = None if remote.files is None else remote.files.get(entry.path)
        if remote.files is None or (found and found.bytes in (None, entry.bytes) and found.sha256 in (None, entry.sha256)):
            continue
        differs = found is not None and found.bytes in (None, entry.bytes)
        raise ArtifactError(
            f"{entry.path} of {remote.origin.repo} is not the file that its manifest lists",
            found="no such file" if found is None else f"sha256 {found.sha256}" if differs else f"{found.bytes} bytes",
            wanted=f"sha256 {entry.sha256}" if differs else f"{entry.bytes} bytes",
            fix=ask_owner(remote.origin),
        )


def ask_owner(origin: HubOrigin) -> str:
    """What to do about a repository whose files are wrong."""
    return f"use another revision (--revision), or tell the owner at https://huggingface.co/{origin.repo}/discussions to push again"


def _check_manifest_file(repo: str, files: Mapping[str, RepositoryFile]) -> None:
    if FILE_NAME not in files:
        raise not_a_bundle(repo, files)
    if (files[FILE_NAME].bytes or 0) > MAX_BYTES:
        found, wanted = f"{files[FILE_NAME].bytes} bytes", f"at most {MAX_BYTES} bytes"
        raise ArtifactError(
            f"{FILE_NAME} of {repo} is too large for a manifest", found=found, wanted=wanted, fix="use another repository"
        )


def not_a_bundle(repo: str, names: Collection[str]) -> ArtifactError:
    """The error for a repository without a manifest. It says what is in there instead, and which command takes it."""
    name = repo.partition("/")[2]
    lora = next((path for path in sorted(names) if path.endswith(_LORAS)), None)
    fix = f"check the name, or push a bundle to it: {shlex.join(['sana-export', 'push', f'{name}-bundle', repo])}"
    if INDEX in names:
        found = f"a checkpoint in diffusers' format ({INDEX})"
        fix = shlex.join(["sana-export", "export", repo, "-o", f"{name}-bundle"])
    elif lora is not None:
        found = f"a LoRA ({lora})"
        fix = (
            shlex.join(["hf", "download", repo, "--local-dir", name])
            + f", then add --lora {shlex.quote(name)} to generate or export"
        )
    elif pickles := sorted(path for path in names if path.endswith(_PICKLES)):
        found = f"pickled weights ({pickles[0]})"
    else:
        found = f"no {FILE_NAME} among its {len(names)} files"
    return ArtifactError(
        f"{repo} is not a bundle", found=found, wanted=f"{FILE_NAME}, in a repository made by `sana-export push`", fix=fix
    )


def _unsafe(source: object, found: str, wanted: str) -> ArtifactError:
    return ArtifactError(f"the manifest of {source} lists files that cannot be downloaded", found=found, wanted=wanted)


def _named(error: ArtifactError, repo: str, folder: Path, fix: str | None = None) -> ArtifactError:
    """`error` about the manifest in `folder`, with the repository's name in place of the cache's folder."""
    message = error.message.replace(str(folder / FILE_NAME), f"{FILE_NAME} of {repo}").replace(str(folder), repo)
    return ArtifactError(message, found=error.found, wanted=error.wanted, fix=fix or ask_owner(HubOrigin(repo, folder.name)))
