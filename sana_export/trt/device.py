"""What GPU this machine has, asked of the driver alone (no CUDA package is needed to plan a build)."""

from __future__ import annotations

import ctypes
import platform

_LIBRARIES = {"Windows": "nvcuda.dll"}
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


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
