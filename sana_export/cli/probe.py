"""Checks whether an engine backend loads, in a process of its own: loading one takes seconds and may crash.

The child runs `python -m sana_export.cli.probe BACKEND` and prints a `BackendProbe` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass

from sana_export.child_process import run_module
from sana_export.errors import SanaExportError
from sana_export.trt.flavour import FLAVOURS, load, offered_capabilities

_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class BackendProbe:
    """What loading the module of an engine backend showed."""

    #: "tensorrt-rtx" or "tensorrt".
    backend: str
    #: Version of the module; None if it did not load.
    version: str | None
    #: Compute capabilities that the module offers to build for.
    compute_capabilities: tuple[str, ...]
    #: Why it did not load; None if it did.
    reason: str | None
    #: The command that fixes that.
    fix: str | None


def probe_backend(backend: str) -> BackendProbe:
    """Load the module of `backend` in a child process and report what came of it."""
    try:
        done = run_module("sana_export.cli.probe", backend, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return BackendProbe(backend, None, (), f"loading it failed: {error}", FLAVOURS[backend].install)
    return BackendProbe(**{**answer, "compute_capabilities": tuple(answer["compute_capabilities"])})


def load_backend(backend: str) -> BackendProbe:
    """Load the module of `backend` in this process."""
    try:
        module = load(backend)
    except SanaExportError as error:
        return BackendProbe(backend, None, (), str(error.found), error.fix)
    return BackendProbe(backend, module.__version__, tuple(offered_capabilities(module)), None, None)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(load_backend(sys.argv[1]))) + "\n")
