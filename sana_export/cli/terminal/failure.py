"""What an error means to the user: the text, the JSON document and the exit code."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sana_export.cli.packages import missing_package
from sana_export.errors import DependencyError, SanaExportError

#: What an OSError means that the environment can mend, by its number; any other one is a bug of ours.
SYSTEM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EMFILE: "too many files are open",
    errno.ENOMEM: "there is too little memory",
    errno.EIO: "the disk reports an error",
}


@dataclass(frozen=True)
class Failure:
    """`document` is the value of "error" in the JSON document of a failed command."""

    text: str
    document: dict[str, Any]
    exit_code: int


def describe(error: BaseException) -> Failure:
    """The failure that `error` is: errors raised on purpose as they are, the environment's with exit code 3, bugs with 1."""
    known = error if isinstance(error, SanaExportError) else _environment(error)
    if known is None:
        return _bug(error)
    return Failure(str(known), known.as_json(), known.exit_code)


def _environment(error: BaseException) -> SanaExportError | None:
    for kind, explain in _ENVIRONMENT.items():
        if isinstance(error, kind):
            return explain(error)
    # Libraries written in Rust give a system error as the text of an exception of their own.
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return _system(OSError(int(number[1]), os.strerror(int(number[1]))))
    return None


def _system(error: Any) -> DependencyError | None:
    if error.errno not in SYSTEM:
        return None
    where = f": {error.filename}" if error.filename else ""
    return DependencyError(SYSTEM[error.errno] + where, found=error.strerror)


def _memory(error: Any) -> DependencyError:
    return DependencyError("there is too little memory", found=str(error) or None, fix="sana-export doctor  (lists what is here)")


_ENVIRONMENT: dict[type[BaseException], Callable[[Any], SanaExportError | None]] = {
    ModuleNotFoundError: missing_package,
    MemoryError: _memory,
    OSError: _system,
}


def _bug(error: BaseException) -> Failure:
    message = f"{type(error).__name__}: {error}"
    text = (
        f"this is a bug in sana-export: {message}\n  fix:    please report it, with what the same command prints with --debug added"
    )
    return Failure(text, {"type": type(error).__name__, "message": message, "found": None, "wanted": None, "fix": None}, 1)
