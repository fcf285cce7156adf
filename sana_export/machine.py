"""What GPUs this machine has, asked of the driver alone (no CUDA package is needed to plan a build)."""

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
_TIMEOUT_SECONDS = 60
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. `memory_bytes` and `driver` are None where only the driver's library answered."""

    name: str
    compute_capability: str
    memory_bytes: int | None = None
    driver: str | None = None


@cache
def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs, as nvidia-smi lists them; the driver's library is asked where that is missing."""
    try:
        listed = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout
        return tuple(map(_parse_gpu, filter(None, listed.splitlines())))
    except (OSError, subprocess.SubprocessError, ValueError):
        capability = gpu_compute_capability()
        return (Gpu("an NVIDIA GPU", capability),) if capability else ()


def gpu_memory_bytes(gpus: Sequence[Gpu]) -> int | None:
    """Of the first of `gpus`, which is the one that engines run on; None where it is not known."""
    return gpus[0].memory_bytes if gpus else None


def gpu_compute_capability(index: int = 0) -> str | None:
    """Compute capability ("8.9") of GPU `index`, or None where there is no driver or no such GPU."""
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
    found = ((name, installed_version(name)) for name in PACKAGES)
    return {"sana_export": __version__, **{name.replace("-", "_"): version for name, version in found if version}}


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
    """Name and driver version of each NVIDIA GPU."""
    return [", ".join(filter(None, (gpu.name, gpu.driver))) for gpu in find_gpus()]
