"""Starts a module of this package in a process of its own.

The child sees the modules that its parent sees, also if the parent runs from a source folder or changed `sys.path`; the
current folder is not added to that (`-P`), so that no file in it can replace a module.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def start_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start `python -m module arguments` and return its process.

    `environment` is laid over this process's own variables; `options` are those of `subprocess.Popen`.
    """
    return subprocess.Popen(_command(module, arguments), env=_environment(environment), **options)


def run_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Run `python -m module arguments` until it ends.

    `environment` is laid over this process's own variables; `options` are those of `subprocess.run`.
    """
    return subprocess.run(_command(module, arguments), env=_environment(environment), **options)


def _command(module: str, arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def _environment(changes: Mapping[str, str] | None) -> dict[str, str]:
    """This process's variables, its `sys.path` as PYTHONPATH, and the changes. An empty entry means the current folder."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, **(changes or {})}
