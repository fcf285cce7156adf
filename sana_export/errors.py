"""Errors that a user can act on.

An error says what was found, what was wanted and the command that fixes it. Its class decides the exit code of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class SanaExportError(Exception):
    """Base class of the errors that sana_export raises. `str()` gives the whole message."""

    exit_code = 1

    def __init__(self, message: str, *, found: object = None, wanted: object = None, fix: str | None = None) -> None:
        self.message, self.found, self.wanted, self.fix = message, found, wanted, fix
        lines = [message]
        if found is not None:
            lines.append(f"  found:  {found}")
        if wanted is not None:
            lines.append(f"  wanted: {wanted}")
        if fix is not None:
            lines.append(f"  fix:    {fix}")
        super().__init__("\n".join(lines))

    def as_json(self) -> dict[str, str | None]:
        """The name of the error's type, and its texts. `error_from_json` reads it back."""
        texts = {"message": self.message, "found": self.found, "wanted": self.wanted, "fix": self.fix}
        return {"type": type(self).__name__, **{name: None if text is None else str(text) for name, text in texts.items()}}


class UsageError(SanaExportError):
    """The request is wrong: a bad option, size, prompt or model name."""

    exit_code = 2


class DependencyError(SanaExportError):
    """Something is missing on this machine: a package, a driver, disk space, a permission, or the network."""

    exit_code = 3


class ArtifactError(SanaExportError):
    """A checkpoint, bundle or engine is damaged, outdated, of another kind, or does not run on this machine."""

    exit_code = 4


class ParityError(SanaExportError):
    """A graph, an engine or an image differs from its reference by more than the limit."""

    exit_code = 5


class Cancelled(SanaExportError):
    """The caller cancelled a build or a call. Nothing was written."""

    exit_code = 130


def first_line(error: object) -> str:
    """The first line of what an error, or a program, says. If it says nothing, the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip()


_BY_NAME = {kind.__name__: kind for kind in (UsageError, DependencyError, ArtifactError, ParityError)}


def error_from_json(document: Mapping[str, Any]) -> SanaExportError:
    """The error whose `as_json` is `document`."""
    texts = dict(document)
    kind = _BY_NAME.get(texts.pop("type"), SanaExportError)
    return kind(texts.pop("message"), **texts)
