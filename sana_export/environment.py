"""Facts about this process and about the package's own source."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from sana_export.user_paths import home_folder, user_path

PACKAGE = Path(__file__).parent
#: The modules of distributions that only require another one, which has the module and can be installed alone.
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


#: ONNX Runtime 1.32 records what it runs in a database in the user's cache folder, and complains if it cannot.
NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1"}


@contextlib.contextmanager
def default_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those environment variables that are not set yet, for the duration of the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@cache
def source_digest(*folders: str) -> str:
    """Hash of the package's source files in these folders or modules ("." for all of them)."""
    return _digest(path for name in folders for path in (*(PACKAGE / name).rglob("*.py"), *PACKAGE.glob(f"{name}.py")))


@cache
def import_digest(module: str) -> str:
    """Hash of the source files of `module` and of every module of the package that it imports, directly or not.

    A cache of what `module` makes is valid as long as this is the same.
    """
    return _digest(PACKAGE.parent / path for path in imported_files(module, PACKAGE.parent))


def imported_files(module: str, root: Path) -> set[str]:
    """The files of `module` and of the modules of its package that it imports, directly or not, relative to the folder `root`.

    They are found in the source, so nothing is imported, and imports inside functions count. The package's own `__init__.py` does
    not: it only offers names of the package to users.
    """
    package = module.partition(".")[0]
    found: set[str] = set()
    pending = [module]
    while pending:
        path = Path(*pending.pop().split("."))
        file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if (root / file).is_file()), None)
        if file is None or file.as_posix() in found or file == Path(package, "__init__.py"):
            continue
        found.add(file.as_posix())
        for node in ast.walk(ast.parse((root / file).read_bytes())):
            names = _imported_names(node)
            pending += [name for name in names if name.partition(".")[0] == package]
    return found


def _imported_names(node: ast.AST) -> list[str]:
    """What an import statement may import: modules, the packages above them, and names of modules, some of which are modules."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)]


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(PACKAGE.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, from its metadata; None if it is not installed.

    TensorRT counts as installed if another distribution brought its module, for example tensorrt-cu13.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    module = _MODULES.get(distribution)
    if module is None or PathFinder.find_spec(module) is None:
        return None
    return next(filter(None, map(installed_version, metadata.packages_distributions().get(module, ()))), None)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison: "2.11.0+cu130" is (2, 11, 0), "5.0rc1" is (5, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def operating_system() -> str:
    """The platform, for example "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def peak_rss_bytes(process: int | None = None) -> int:
    """Peak resident memory of this process, or of the process with the id `process`. 0 if the system does not report it.

    On Linux this is VmHWM and not `ru_maxrss`, which also counts what the parent had resident at the fork.
    """
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_text("utf-8")
    except OSError:  # another system, or a process that has ended
        status = ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return int(found[1]) * 1024
    if process is not None:
        return 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_free_memory() -> None:
    """Return freed memory to the system. glibc keeps it between blocks in use; with other C libraries this does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def cache_folder() -> Path:
    """The folder of sana_export's caches: $SANA_EXPORT_CACHE, or `sana_export` in the user's cache folder.

    Raises DependencyError if neither is set and the user has no home folder.
    """
    if given := os.environ.get("SANA_EXPORT_CACHE"):
        return user_path(given, "SANA_EXPORT_CACHE")
    if root := os.environ.get("XDG_CACHE_HOME"):
        return user_path(root, "XDG_CACHE_HOME") / "sana_export"
    return home_folder("SANA_EXPORT_CACHE") / ".cache" / "sana_export"
