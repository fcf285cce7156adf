"""Where a bundle on this disk came from, if it came from the hub, and the command that gets what is missing from there."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from sana_export.files import read_unlisted, real_path, write_whole

#: The record in a pulled bundle. It is not in the manifest.
FILE_NAME = "hub.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: The names of repositories that the hub accepts.
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
#: The hub's cache has the folders models--owner--name/snapshots/<commit>.
_CACHED = "models--"
#: Where huggingface_hub keeps its cache by default, below the home folder.
_DEFAULT_CACHE = (".cache", "huggingface", "hub")


@dataclass(frozen=True)
class HubOrigin:
    """The repository that a bundle was downloaded from."""

    #: The repository, owner/name.
    repo: str
    #: The commit.
    commit: str
    #: The folder that it was pulled to. None: it is in the hub's cache.
    folder: Path | None = None
    #: The hub's cache, if that is where it is.
    cache: Path | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.partition("/")[2]

    def pull_command(self, *options: str, output: Path | None = None) -> str:
        """The command that downloads what is missing or damaged here, with more options. `output`: into this folder."""
        words = ["sana-export", "pull", self.repo, "--revision", self.commit]
        if (target := output or self.folder) is not None:
            words += ["-o", str(target)]
        if self.cache is not None and self.cache.parts[-3:] != _DEFAULT_CACHE:
            words += ["--cache-dir", str(self.cache)]
        return shlex.join([*words, *options])

    def save(self, bundle: Path) -> None:
        """Record it in the folder `bundle`."""
        write_whole(bundle / FILE_NAME, json.dumps({"repo": self.repo, "commit": self.commit}) + "\n")


def origin_of(bundle: Path) -> HubOrigin | None:
    """The origin of the bundle in the folder `bundle`: one in the hub's cache, or one that was pulled. None for any other."""
    parts = real_path(bundle).parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith(_CACHED) and _COMMIT.fullmatch(parts[-1]):
        repo = parts[-3].removeprefix(_CACHED).replace("--", "/")
        return HubOrigin(repo, parts[-1], cache=Path(*parts[:-3])) if REPO.fullmatch(repo) else None
    try:
        document = json.loads(read_unlisted(bundle / FILE_NAME) or b"null")
        repo, commit = document["repo"], document["commit"]
        if REPO.fullmatch(repo) and _COMMIT.fullmatch(commit):
            return HubOrigin(repo, commit, folder=bundle)
    except (ValueError, TypeError, KeyError, RecursionError):  # no record, or not one of ours
        pass
    return None
