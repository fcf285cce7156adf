"""Objects that belong to one process: they hold sessions, or tensors on a device."""

from __future__ import annotations

from typing import NoReturn

from sana_export.errors import UsageError


class OfThisProcess:
    """Base of objects that cannot be pickled or copied. Who tries gets an error that says what to do."""

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"a {type(self).__name__} cannot be copied or handed to another process: it holds what a backend has loaded",
            found="pickle, copy, or the argument of a process",
            wanted="the bundle's folder, from which each process opens a runtime of its own",
            fix='in the worker: runtime = SanaRuntime.from_pretrained("bundle")',
        )
