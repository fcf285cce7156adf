"""Errors that a user can act on.

Every error says what was found, what was wanted and the line that mends it, and carries the exit code of the command line.
"""

from __future__ import annotations


class SanaExportError(Exception):
    """Base of all errors raised on purpose. `str()` is the whole message for the user."""

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


class UsageError(SanaExportError):
    """The request itself cannot be met: a bad option, size, prompt or model name."""

    exit_code = 2


class DependencyError(SanaExportError):
    """The machine lacks something: a package, a driver, disk space, permission, the network."""

    exit_code = 3


class ArtifactError(SanaExportError):
    """A checkpoint, bundle or engine is damaged, stale, foreign or unfit for this machine."""

    exit_code = 4


class ParityError(SanaExportError):
    """A graph, an engine or an image differs from its reference by more than the stated limit."""

    exit_code = 5
