"""What this machine has: processor, memory, GPUs, and which engine backends load. Nothing heavy is imported for it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sana_export.environment import operating_system
from sana_export.machine import Gpu, cpu_name, find_gpus, memory_bytes, usable_cores
from sana_export.trt.flavour import FLAVOURS

_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Machine:
    """`memory_bytes` is 0 where the system does not tell."""

    python: str
    executable: str
    platform: str
    operating_system: str
    processor: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Builder:
    """Whether the module of an engine backend loads here: its version and the compute capabilities that it names, or why not."""

    backend: str
    version: str | None
    compute_capabilities: tuple[str, ...]
    reason: str | None
    fix: str | None


def this_machine() -> Machine:
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        operating_system=operating_system(),
        processor=cpu_name(),
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        gpus=find_gpus(),
    )


def probe_builder(backend: str) -> Builder:
    """Load the module of `backend` in a process of its own and report."""
    program = (
        "import json, sys\n"
        "from sana_export.errors import SanaExportError\n"
        "from sana_export.trt.flavour import load, offered_capabilities\n"
        "try:\n"
        f"    module = load({backend!r})\n"
        "    answer = [module.__version__, list(offered_capabilities(module)), None, None]\n"
        "except SanaExportError as error:\n"
        "    answer = [None, [], str(error.found), error.fix]\n"
        "print(json.dumps(answer))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
            env=environment,
        )
        version, capabilities, reason, fix = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return Builder(backend, None, (), f"loading it failed: {error}", FLAVOURS[backend].install)
    return Builder(backend, version, tuple(capabilities), reason, fix)
