"""Facts of this process and of this package's own code."""

from __future__ import annotations

import hashlib
import platform
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent


@cache
def source_digest(*folders: str) -> str:
    """Hash of the package's own code in these folders ("." for all of it): what is made by other code is made again."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (PACKAGE / folder).rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def operating_system() -> str:
    """The platform that engines are bound to, for example "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def peak_rss_bytes() -> int:
    """Largest resident size of this process since it was started; 0 where the system does not tell.

    Linux keeps in `ru_maxrss` also what the parent had resident at the fork, so the program's own high-water mark is read instead.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
