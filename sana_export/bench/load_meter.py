"""The machine and the versions that a report's figures belong to."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from sana_export import __version__

PACKAGES = (
    "numpy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)


def describe_machine() -> dict[str, Any]:
    """cpu (name), cores (that this process may use), memory (bytes), gpu (name and driver of each), os, python."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory": memory_bytes(),
        "gpu": gpu_names(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    """Package to version, for those of `PACKAGES` that are installed; read from their metadata, not by importing them."""
    versions = {"sana_export": __version__}
    for name in PACKAGES:
        try:
            versions[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def gpu_names() -> list[str]:
    """Name and driver version of each NVIDIA GPU, as nvidia-smi lists them; none without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def busy_seconds() -> float | None:
    """Processor seconds that all processes together have used since the machine started; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text("utf-8").splitlines()[0].split()
        user, nice, system, _idle, _wait, interrupt, soft_interrupt = map(int, fields[1:8])
    except (OSError, ValueError, IndexError):
        return None
    return (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")


class LoadMeter:
    """The share of all cores' time that other processes use from now on. `own`: processor seconds of our own processes."""

    def __init__(self, own: Callable[[], float]) -> None:
        self._own, self._started, self._before = own, time.monotonic(), self._elsewhere(own)

    def other_load(self) -> float | None:
        """0 to 1 since the start; None where the system does not tell."""
        after = self._elsewhere(self._own)
        if self._before is None or after is None:
            return None
        available = (time.monotonic() - self._started) * (os.cpu_count() or 1)
        return min(max((after - self._before) / available, 0.0), 1.0)

    @staticmethod
    def _elsewhere(own: Callable[[], float]) -> float | None:
        busy = busy_seconds()
        return None if busy is None else busy - own() - time.process_time()
