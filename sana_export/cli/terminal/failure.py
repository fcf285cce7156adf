"""What an exception means to the user: the text, the JSON document and the exit code."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sana_export.cli.packages import missing_package
from sana_export.errors import DependencyError, SanaExportError

#: Number of an OSError that the user can fix to its meaning. Any other one is a bug.
SYSTEM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EMFILE: "too many open files",
    errno.ENOMEM: "out of memory",
    errno.EIO: "the disk reports an error",
}


@dataclass(frozen=True)
class Failure:
    """A failed command."""

    #: The message on stderr.
    text: str
    #: The value of "error" in the JSON document.
    document: dict[str, Any]
    #: Exit code of the process.
    exit_code: int


def describe(error: BaseException) -> Failure:
    """The failure that `error` means: our own errors as they are, the system's with exit code 3, anything else as a bug with 1."""
    known = error if isinstance(error, SanaExportError) else _environment(error)
    if known is None:
        return _bug(error)
    return Failure(str(known), known.as_json(), known.exit_code)


def _environment(error: BaseException) -> SanaExportError | None:
    """The error of the environment that `error` is; None if it is not one."""
    for kind, explain in _ENVIRONMENT.items():
        if isinstance(error, kind):
            return explain(error)
    # Libraries written in Rust put the system's error into the text of an exception of their own.
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return _system(OSError(int(number[1]), os.strerror(int(number[1]))))
    return None


def _system(error: Any) -> DependencyError | None:
    if error.errno not in SYSTEM:
        return None
    place = f": {error.filename}" if error.filename else ""
    return DependencyError(SYSTEM[error.errno] + place, found=error.strerror)


def _memory(error: Any) -> DependencyError:
    return DependencyError("out of memory", found=str(error) or None, fix="sana-export doctor  (shows this machine's memory)")


_ENVIRONMENT: dict[type[BaseException], Callable[[Any], SanaExportError | None]] = {
    ModuleNotFoundError: missing_package,
    MemoryError: _memory,
    OSError: _system,
}


def _bug(error: BaseException) -> Failure:
    message = f"{type(error).__name__}: {error}"
    text = (
        f"this is a bug in sana-export: {message}\n"
        "  fix:    please report it, with the output of the same command with --debug added"
    )
    return Failure(text, {"type": type(error).__name__, "message": message, "found": None, "wanted": None, "fix": None}, 1)
