"""Facts about this machine: GPUs, processor, memory and installed packages. They are found without any CUDA package."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sana_export import __version__
from sana_export.environment import installed_version
from sana_export.errors import UsageError

#: The packages whose versions reports show.
PACKAGES = (
    "numpy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
)

_LIBRARIES = {"Windows": "nvcuda.dll"}
#: What nvidia-smi calls the limits that a GPU's speed depends on, and its state at the moment.
_STATE = (
    "clocks.max.sm",
    "clocks.max.memory",
    "clocks.current.sm",
    "clocks.current.memory",
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
    #: Its memory. None if it is not known.
    memory_bytes: int | None = None
    #: The version of its driver. None if it is not known.
    driver: str | None = None


def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that CUDA can use, in CUDA's order: by default engines run on the first one. Empty without a driver.

    The driver is asked. nvidia-smi has another order and ignores CUDA_VISIBLE_DEVICES.
    """
    return ask_cuda()[0]


def find_cuda_error() -> str | None:
    """The name of the error with which NVIDIA's driver says why there is no GPU. None if there is a GPU, or no driver."""
    return ask_cuda()[1]


@cache
def ask_cuda() -> tuple[tuple[Gpu, ...], str | None]:
    """`find_gpus` and `find_cuda_error`. The driver is asked once."""
    driver, count = _load_driver(), ctypes.c_int()
    if driver is None:
        return (), None
    if status := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        return (), (name.value or b"CUDA error %d" % status).decode()
    version = _driver_version() if count.value else None
    return tuple(_ask_driver(driver, index, version) for index in range(count.value)), None


def _ask_driver(driver: Any, index: int, version: str | None) -> Gpu:
    device, major, minor, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    known = driver.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0
    return Gpu(name.value.decode("utf-8", "replace"), f"{major.value}.{minor.value}", size.value if known else None, version)


def gpu_uuid(index: int = 0) -> str | None:
    """The name of the GPU that CUDA numbers `index`, as NVIDIA's tools know it ("GPU-..."), or None. It is unique in the world."""
    driver, device, name = _load_driver(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    if driver.cuDeviceGetUuid_v2(name, device):
        return None
    return f"GPU-{uuid.UUID(bytes=bytes(name))}"


def _load_driver() -> Any:
    """NVIDIA's driver library. None if it is missing."""
    try:
        return ctypes.CDLL(_LIBRARIES.get(platform.system(), "libcuda.so.1"))
    except OSError:
        return None


def _driver_version() -> str | None:
    """The version of NVIDIA's driver, which is one for all GPUs. None if nvidia-smi is missing."""
    listed = _nvidia_smi("driver_version")
    return listed[0][0] if listed else None


def _nvidia_smi(*fields: str) -> list[list[str]]:
    """The values of `fields` for each GPU that nvidia-smi lists. Empty if it is missing or fails."""
    command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[value.strip() for value in line.split(",")] for line in filter(None, listed.splitlines())]


def gpu_state() -> list[dict[str, str]]:
    """Clocks, power, temperature, and memory of each GPU, in nvidia-smi's words and units. Empty without nvidia-smi."""
    return [dict(zip(_STATE, values, strict=True)) for values in _nvidia_smi(*_STATE) if len(values) == len(_STATE)]


def gpu_memory_bytes(gpus: Sequence[Gpu]) -> int | None:
    """The memory of the first of `gpus`, which engines run on by default. None if it is not known."""
    return gpus[0].memory_bytes if gpus else None


def gpu_compute_capability(index: int = 0) -> str | None:
    """The compute capability ("8.9") of the GPU that CUDA numbers `index`. None if there is no such GPU."""
    gpus = find_gpus()
    return gpus[index].compute_capability if 0 <= index < len(gpus) else None


def require_gpu(index: int) -> None:
    """Raise UsageError if there is no GPU that CUDA numbers `index`."""
    gpus = find_gpus()
    if not 0 <= index < len(gpus):
        listed = ", ".join(f"{number}: {gpu.name}" for number, gpu in enumerate(gpus))
        raise UsageError(
            f"there is no GPU {index}",
            found=listed or find_cuda_error() or "no NVIDIA GPU and driver",
            wanted="the number of a GPU that CUDA can use",
            fix="sana-export doctor",
        )


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
