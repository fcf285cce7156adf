"""The packages that sana_export can use: which are installed, which are missing, and the command that installs them.

Everything is read from package metadata; nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from sana_export.environment import installed_version, release
from sana_export.errors import DependencyError
from sana_export.installation import DISTRIBUTION, install_command

#: Extras that are not for users.
DEVELOPMENT = ("dev",)
#: What each extra is for.
PURPOSES = {
    "": "every command",
    "cpu": "sample on a CPU",
    "cuda": "sample on an NVIDIA GPU through ONNX Runtime",
    "export": "export, verify, bench, engines",
    "optimum": "our commands in optimum-cli",
    "hub": "push, pull and load bundles of the Hugging Face hub",
    "serve": "serve images over HTTP",
    "bench": "plots, power and clocks in bench's report",
    "tensorrt-rtx": "build and run TensorRT-RTX engines",
    "tensorrt": "build and run TensorRT engines",
    "onnxruntime-tensorrt-rtx": "run on ONNX Runtime's TensorRT-RTX provider",
}
#: Distributions that provide the same module and must not be installed together.
EXCLUSIVE = ("onnxruntime", "onnxruntime-gpu")
#: Modules that we import directly and that come with another package, by the extra that brings it.
TRANSITIVE = {"onnx-ir": "export", "safetensors": "export", "huggingface-hub": "export"}


@dataclass(frozen=True)
class Package:
    """One requirement of sana_export."""

    #: Name of the distribution.
    name: str
    #: The extra that requires it; "" if it is always required.
    extra: str
    #: The lowest version that works; None for any.
    minimum: str | None
    #: The installed version; None if it is not installed.
    version: str | None

    @property
    def install(self) -> str:
        """The command that installs it, and first removes a package that it must not be installed with."""
        others = [name for name in EXCLUSIVE if name != self.name and installed_version(name)] if self.name in EXCLUSIVE else []
        return "".join(f"pip uninstall -y {name} && " for name in others) + install_command(self.extra)

    @property
    def problem(self) -> str | None:
        """Why it cannot be used, "missing" or "older than <minimum>"; None if it can."""
        if self.version is None:
            return "missing"
        if self.minimum and release(self.version) < release(self.minimum):
            return f"older than {self.minimum}"
        return None


def packages() -> list[Package]:
    """Every package in sana_export's metadata, except those for developers. Empty in a source tree that is not installed."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?\s*(?:>=\s*([\w.]+))?", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match is None or match[1] == DISTRIBUTION or (extra and extra[1] in DEVELOPMENT):
            continue  # an extra that contains another one names sana_export itself
        found.append(Package(match[1], extra[1] if extra else "", match[2], installed_version(match[1])))
    return found


def require(*extras: str) -> None:
    """Raise DependencyError, naming everything that is missing, unless all packages of `extras` are installed."""
    lacking = [package for package in packages() if package.extra in extras and package.problem]
    if lacking:
        raise DependencyError(
            "this command needs packages that are not installed",
            found=", ".join(f"{package.name} {package.problem}" for package in lacking),
            wanted=", ".join(f"{package.name}>={package.minimum}" if package.minimum else package.name for package in lacking),
            fix=install_command(*(package.extra for package in lacking)),
        )


def missing_package(error: ModuleNotFoundError) -> DependencyError | None:
    """The error to show for a module of an optional package; None for any other module, which is a bug."""
    root = (error.name or "").partition(".")[0].replace("_", "-")
    extras = [package.extra for package in packages() if package.name.replace("_", "-") == root]
    if not extras and root not in TRANSITIVE:
        return None
    extra = extras[0] if extras else TRANSITIVE[root]
    return DependencyError(
        "this command needs a package that is not installed",
        found=f"no module {error.name}",
        wanted=root,
        fix=install_command(extra),
    )


def exclusive_conflict(names: Iterable[str] = EXCLUSIVE) -> str | None:
    """What to do if several packages that provide the same module are installed; None if at most one is."""
    installed = [name for name in names if installed_version(name)]
    if len(installed) < 2:
        return None
    return (
        f"{' and '.join(installed)} are installed together and overwrite each other's files: "
        f"pip uninstall -y {' '.join(installed)}, then install the one that you need"
    )
