"""Takes out of a report what says whose machine it was: its folders, its user and host, and addresses in its network."""

from __future__ import annotations

import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A name of at most this many letters stays: it would be part of too much else.
_SHORTEST_NAME = 2
#: Names of users and hosts that say nothing about their owner, and that a report may contain for other reasons.
_COMMON_NAMES = frozenset(
    ("admin", "ci", "docker", "gpu", "jovyan", "localhost", "nvidia", "root", "runner", "test", "torch", "ubuntu", "user")
)
#: Folders below the root that are alike on all machines.
_SYSTEM_FOLDERS = frozenset(("bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "tmp", "usr"))
#: Hosts that everyone knows. Any other one, for example of a package index, may be a company's own.
_PUBLIC_HOSTS = re.compile(
    r"(?:[\w-]+\.)*(?:github\.com|huggingface\.co|nvidia\.com|onnxruntime\.ai|pypi\.org|pythonhosted\.org|pytorch\.org)"
)
_URL = re.compile(r"(?P<scheme>\b[a-z][a-z+]*://)(?:[^\s/@'\"]*@)?(?P<host>[^\s/:?#'\"]+)(?P<port>:\d+)?")
#: How pip's errors name a host.
_POOL = re.compile(r"(?<=host=')[^']+")
#: The identifier of one single GPU.
_GPU_ID = re.compile(r"\b(GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
#: Where an absolute path may begin: not within another word, except after a compiler's option for a folder.
_BEGINNING = r"(?:(?<![\w.~$/-])|(?<=-[IL]))"
#: An absolute path: in quotes up to the closing one, elsewhere up to a space or a sign that ends a word.
_PATHS = tuple(
    re.compile(rf"(?<='){start}[^'\n]+(?=')|(?<=\"){start}[^\"\n]+(?=\")|{_BEGINNING}{start}[^\s'\"`,;:()\[\]{{}}|<>=]+")
    for start in ("/", r"[A-Za-z]:[\\/]")
)
#: The part of a path that ends with the folder of Python's packages.
_PACKAGES = re.compile(r".*(?:site-packages|dist-packages|python3\.\d+)[\\/]")


@dataclass(frozen=True)
class Redaction:
    """What to replace in a report."""

    #: Folder to what stands for it.
    folders: Mapping[str, str]
    #: Name of a user or host to what stands for it.
    names: Mapping[str, str]

    @classmethod
    def of_this_machine(cls, work: Path) -> Redaction:
        """For a run in this process that keeps its files in `work`."""
        names = {**dict.fromkeys(_hosts(), "this-machine"), **dict.fromkeys(_users(), "user")}
        return cls(
            {str(folder): stand_in for folder, stand_in in _folders(work) if len(folder.parts) > 1},
            {name: own for name, own in names.items() if len(name) > _SHORTEST_NAME and name.lower() not in _COMMON_NAMES},
        )

    def apply(self, value: Any) -> Any:
        """`value` with every text in it changed. Keys stay: they are our own words."""
        if isinstance(value, Mapping):
            return {key: self.apply(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.apply(item) for item in value]
        if not isinstance(value, str):
            return value
        for pattern, replacement in self._replacements():
            value = pattern.sub(replacement, value)
        return value

    def _replacements(self) -> Iterator[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]:
        yield _URL, _public_address
        yield _POOL, "a-host"
        yield _GPU_ID, r"\1-id"
        # The longest first: the working folder is often below the home folder.
        for folder in sorted(self.folders, key=len, reverse=True):
            yield _folder_pattern(folder), self.folders[folder]
        for pattern in _PATHS:
            yield pattern, _last_part
        for name in sorted(self.names, key=len, reverse=True):
            yield re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE), self.names[name]


def _folders(work: Path) -> Iterator[tuple[Path, str]]:
    """Folders that a report may name, each also in the form without links, and what stands for each."""
    named = [(Path.cwd(), "."), (work.absolute(), "$WORK"), (Path(tempfile.gettempdir()), "/tmp")]
    shell = Path(os.environ.get("PWD", "."))
    if shell.resolve() == Path.cwd():  # the same folder by another path
        named.append((shell, "."))
    if sys.prefix != sys.base_prefix:
        named.append((Path(sys.prefix), "$VENV"))
    if (home := _home()) is not None:
        named.append((home, "~"))
    for folder, stand_in in named:
        yield folder.resolve(), stand_in
        yield folder, stand_in


def _home() -> Path | None:
    """The home folder. None for a user without one, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _hosts() -> Iterator[str]:
    """The machine's name with and without its domain."""
    node = platform.node()
    yield node
    yield node.partition(".")[0]


def _users() -> Iterator[str]:
    home = _home()
    yield "" if home is None else home.name
    yield os.environ.get("SUDO_USER", "")
    try:
        yield getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return


def _folder_pattern(folder: str) -> re.Pattern[str]:
    """Matches `folder`, not the beginning of another name, with separators of any kind and number."""
    parts = [re.escape(part) for part in re.split(r"[\\/]+", folder)]
    return re.compile(_BEGINNING + r"[\\/]+".join(parts) + r"(?![\w-])", re.IGNORECASE if os.name == "nt" else 0)


def _public_address(match: re.Match[str]) -> str:
    """The address without its user and password, and without a host that only its owner knows."""
    public = _PUBLIC_HOSTS.fullmatch(match["host"])
    return match["scheme"] + (match["host"] + (match["port"] or "") if public else "a-host")


def _last_part(match: re.Match[str]) -> str:
    """What stands for an absolute path: its last part, or what follows the folder of Python's packages.

    A path in a system folder stays. So does what is not a path on this machine: names of ONNX nodes begin with a slash too.
    """
    path = match[0]
    if path.startswith("/"):
        root, _, rest = path.lstrip("/").partition("/")
        if not rest or root in _SYSTEM_FOLDERS or root not in {folder.name for folder in Path("/").iterdir()}:
            return path
    public = _PACKAGES.sub("", path)
    return ".../" + (public if public != path else re.split(r"[\\/]+", path.rstrip("\\/"))[-1])
