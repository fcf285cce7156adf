"""Facts about this machine: GPUs, processor, memory and installed packages. They are found without any CUDA package."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sana_export import __version__
from sana_export.environment import installed_version

#: The packages whose versions reports show.
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

_LIBRARIES = {"Windows": "nvcuda.dll"}
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits")
#: What nvidia-smi calls the limits that a GPU's speed depends on, and its state at the moment.
_STATE = (
    "clocks.max.sm",
    "clocks.max.memory",
    "clocks.sm",
    "clocks.memory",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "memory.total",
    "memory.used",
    "persistence_mode",
    "pstate",
)
_TIMEOUT_SECONDS = 60
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU."""

    #: Its name.
    name: str
    #: Its compute capability ("8.9").
    compute_capability: str
    #: Its memory. None if nvidia-smi did not report it.
    memory_bytes: int | None = None
    #: The version of its driver. None if nvidia-smi did not report it.
    driver: str | None = None


@cache
def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that nvidia-smi lists. If nvidia-smi is missing or fails, the driver's library is asked for the first GPU."""
    try:
        listed = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout
        return tuple(map(_parse_gpu, filter(None, listed.splitlines())))
    except (OSError, subprocess.SubprocessError, ValueError):
        capability = gpu_compute_capability()
        return (Gpu("an NVIDIA GPU", capability),) if capability else ()


def gpu_state() -> list[dict[str, str]]:
    """Clocks, power, temperature, and memory of each GPU, in nvidia-smi's words and units. Empty without nvidia-smi."""
    command = ("nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader")
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(_STATE, map(str.strip, line.split(",")), strict=True)) for line in filter(None, listed.splitlines())]


def gpu_memory_bytes(gpus: Sequence[Gpu]) -> int | None:
    """The memory of the first of `gpus`, which engines run on by default. None if it is not known."""
    return gpus[0].memory_bytes if gpus else None


def gpu_compute_capability(index: int = 0) -> str | None:
    """The compute capability ("8.9") of the GPU `index`, from the driver. None if there is no driver or no such GPU."""
    try:
        driver = ctypes.CDLL(_LIBRARIES.get(platform.system(), "libcuda.so.1"))
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), index),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return f"{major.value}.{minor.value}"


def _parse_gpu(line: str) -> Gpu:
    name, capability, memory, driver = (field.strip() for field in line.rsplit(",", 3))
    return Gpu(name, capability, int(memory) << 20 if memory.isdecimal() else None, driver)


def describe_machine() -> dict[str, Any]:
    """The machine as reports show it: cpu (name), cores (usable), memory (bytes), gpu (name and driver of each), os, python."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory": memory_bytes(),
        "gpu": gpu_names(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    """The versions of sana_export and of the installed `PACKAGES`, from their metadata. Nothing is imported."""
    found = ((name, installed_version(name)) for name in PACKAGES)
    return {"sana_export": __version__, **{name.replace("-", "_"): version for name, version in found if version}}


def cpu_name() -> str:
    """The system's name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The number of logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory. 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def gpu_names() -> list[str]:
    """The name and, if it is known, the driver version of each NVIDIA GPU."""
    return [", ".join(filter(None, (gpu.name, gpu.driver))) for gpu in find_gpus()]
