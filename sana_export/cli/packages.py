"""The packages that sana_export can use, read from its own metadata: what is here, what is missing, the line that installs it.

Nothing is imported: a package counts as present where its metadata says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from sana_export.errors import DependencyError

DISTRIBUTION = "sana-export"
#: Extras that are not for users.
DEVELOPMENT = ("dev",)
#: What each extra is for.
PURPOSES = {
    "": "every command",
    "cpu": "sample on a CPU",
    "cuda": "sample on an NVIDIA GPU through ONNX Runtime",
    "export": "export, verify, bench, engines",
    "bench": "plots, power and clocks in bench's report",
    "tensorrt-rtx": "build and run TensorRT-RTX engines",
    "tensorrt": "build and run TensorRT engines",
}
#: Distributions that provide one module and must not be installed together.
EXCLUSIVE = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Package:
    """One requirement of sana_export: `extra` is empty for what it always needs, `version` None where it is not installed."""

    name: str
    extra: str
    minimum: str | None
    version: str | None

    @property
    def install(self) -> str:
        """The line that installs it, after the removal of what it must not be installed beside."""
        others = [name for name in EXCLUSIVE if name != self.name and installed_version(name)] if self.name in EXCLUSIVE else []
        return "".join(f"pip uninstall -y {name} && " for name in others) + install_line(self.extra)

    @property
    def problem(self) -> str | None:
        """Why it cannot be used: "missing" or "older than <minimum>"; None where it can."""
        if self.version is None:
            return "missing"
        if self.minimum and _numbers(self.version) < _numbers(self.minimum):
            return f"older than {self.minimum}"
        return None


def packages() -> list[Package]:
    """Every package that sana_export names in its metadata, except those of developers."""
    found = []
    for requirement in metadata.requires(DISTRIBUTION) or ():
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?\s*(?:>=\s*([\w.]+))?", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match is None or (extra and extra[1] in DEVELOPMENT):
            continue
        found.append(Package(match[1], extra[1] if extra else "", match[2], installed_version(match[1])))
    return found


def installed_version(name: str) -> str | None:
    """The version of the distribution `name`, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def install_line(*extras: str) -> str:
    """The line that installs sana_export with `extras`."""
    names = ",".join(sorted(set(filter(None, extras))))
    return f'pip install "{DISTRIBUTION}[{names}]"' if names else f"pip install {DISTRIBUTION}"


def require(*extras: str) -> None:
    """Raise DependencyError, naming all that is missing, unless every package of `extras` is here."""
    try:
        wanted = [package for package in packages() if package.extra in extras]
    except metadata.PackageNotFoundError:  # a source tree that is not installed: the imports will tell
        return
    lacking = [package for package in wanted if package.problem]
    if lacking:
        raise DependencyError(
            "this command needs packages that are not installed",
            found=", ".join(f"{package.name} {package.problem}" for package in lacking),
            wanted=", ".join(f"{package.name}>={package.minimum}" if package.minimum else package.name for package in lacking),
            fix=install_line(*(package.extra for package in lacking)),
        )


def missing_package(error: ModuleNotFoundError) -> DependencyError | None:
    """The error for a module that a package of sana_export brings; None for a module of another kind, which is a bug."""
    root = (error.name or "").partition(".")[0].replace("_", "-")
    extras = [package.extra for package in packages() if package.name.replace("_", "-") == root]
    if not extras and root not in TRANSITIVE:
        return None
    extra = extras[0] if extras else TRANSITIVE[root]
    return DependencyError(
        "this command needs a package that is not installed",
        found=f"no module {error.name}",
        wanted=root,
        fix=install_line(extra),
    )


#: Modules that come with a package of ours (by the extra that brings it) and are imported directly.
TRANSITIVE = {"onnx-ir": "export", "safetensors": "export", "huggingface-hub": "export"}


def exclusive_conflict(names: Iterable[str] = EXCLUSIVE) -> str | None:
    """What to do where several packages that share one module are installed; None where there is at most one."""
    here = [name for name in names if installed_version(name)]
    if len(here) < 2:
        return None
    return (
        f"{' and '.join(here)} are installed together and overwrite each other's files: "
        f"pip uninstall -y {' '.join(here)}, then install the one that you need"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
