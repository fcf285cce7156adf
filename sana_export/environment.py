"""Facts of this process and of this package's own code."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent


@cache
def source_digest(*folders: str) -> str:
    """Hash of the package's own code in these folders or modules ("." for all of it): what is made by other code is made again."""
    digest = hashlib.sha256()
    found = (path for name in folders for path in (*(PACKAGE / name).rglob("*.py"), *PACKAGE.glob(f"{name}.py")))
    for path in sorted(found):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, from its metadata; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison: "2.11.0+cu130" is (2, 11, 0), "5.0rc1" is (5, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def operating_system() -> str:
    """The platform that engines are bound to, for example "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def peak_rss_bytes(process: int | None = None) -> int:
    """Largest resident size of this process, or of `process`, since it was started; 0 where the system does not tell.

    Linux keeps in `ru_maxrss` also what the parent had resident at the fork, so the program's own high-water mark is read instead.
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
    """Give freed memory back to the system where the C library keeps it (glibc does, between blocks that are in use)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def cache_folder() -> Path:
    """Where sana_export keeps what it makes for itself: $SANA_EXPORT_CACHE, or sana_export under the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SANA_EXPORT_CACHE") or f"{root}/sana_export").expanduser()
