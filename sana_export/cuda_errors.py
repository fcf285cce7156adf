"""What CUDA's errors mean: what is wanted, and the fix.

NVIDIA's driver, its CUDA runtime and the libraries on them report one error in many forms: by its name ("CUDA_ERROR_NO_DEVICE",
"cudaErrorNoDevice"), by its number ("CUDA initialization failure with error: 100") or in words ("no CUDA-capable device is
detected"). The numbers and words are those of NVIDIA's cuda.h and driver_types.h; from 100 on both libraries share the numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CudaFailure:
    """A kind of error, and what to do about it."""

    #: What is wanted.
    wanted: str
    #: What the user can do.
    fix: str
    #: The numbers of its errors.
    codes: frozenset[int]
    #: Their names, without "CUDA_ERROR_" and "cudaError", and their words.
    texts: tuple[str, ...]

    def is_in(self, text: str) -> bool:
        """Whether `text` reports an error of this kind."""
        if any(int(code) in self.codes for code in _NUMBER.findall(text)):
            return True
        if any(_squeezed(name) in map(_squeezed, self.texts) for name in _NAME.findall(text)):
            return True
        return any(" " in words and words in text.lower() for words in self.texts)


#: How the libraries write an error's number: "cudaError 802: …", "CUDA error 999", "CUDA initialization failure with error: 35".
_NUMBER = re.compile(r"cuda(?: [a-z]+){0,4} ?error[:=]? ?(\d+)", re.IGNORECASE)
_NAME = re.compile(r"CUDA_ERROR_([A-Z_]+)|cudaError([A-Z][A-Za-z]+)")


def _squeezed(name: str | tuple[str, ...]) -> str:
    return "".join(name).replace("_", "").lower()


OUT_OF_MEMORY = CudaFailure(
    "more free GPU memory",
    "use --memory staged, generate fewer or smaller images at once, or close other programs that use the GPU",
    frozenset({2}),
    # The last one is cuda-core's before 1.1, which drops the error's name.
    ("OUT_OF_MEMORY", "MemoryAllocation", "out of memory", "insufficient memory", "failed to allocate memory from pool"),
)
_FAILURES = (
    OUT_OF_MEMORY,
    CudaFailure(
        "a newer NVIDIA driver",
        "update NVIDIA's driver; sana-export doctor shows the installed one",
        frozenset({35, 36, 222, 500}),
        (
            "InsufficientDriver",
            "CallRequiresNewerDriver",
            "UNSUPPORTED_PTX_VERSION",
            "NOT_FOUND",
            "SymbolNotFound",
            "driver version is insufficient",
            "not supported in the installed cuda driver",
            "named symbol not found",
        ),
    ),
    CudaFailure(
        "NVIDIA's driver",
        "install NVIDIA's driver (sana-export doctor shows what was found), or use --backend onnxruntime",
        frozenset({3, 34}),
        (
            "NOT_INITIALIZED",
            "InitializationError",
            "STUB_LIBRARY",
            "initialization error",
            "stub library",
            "nvidia display driver is installed",
            "libcuda.so.1: cannot open",
            "failed to dlopen libcuda",
        ),
    ),
    CudaFailure(
        "a GPU that CUDA can use",
        "run nvidia-smi, and check CUDA_VISIBLE_DEVICES and --device; start a container with its GPUs (docker run --gpus all);"
        " or use --backend onnxruntime",
        frozenset({100, 101}),
        ("NO_DEVICE", "INVALID_DEVICE", "no cuda-capable device", "invalid device ordinal", "device_id must be within"),
    ),
    CudaFailure(
        "a GPU that no other program has to itself",
        "close the other program that uses the GPU, or allow several: sudo nvidia-smi --compute-mode=DEFAULT",
        frozenset({46}),
        ("DEVICE_UNAVAILABLE", "DevicesUnavailable", "busy or unavailable"),
    ),
    CudaFailure(
        "a machine whose GPUs are connected",
        "start NVIDIA's fabric manager, which GPUs with NVSwitch need: sudo systemctl start nvidia-fabricmanager",
        frozenset({802}),
        ("SYSTEM_NOT_READY", "system not yet initialized"),
    ),
    CudaFailure(
        "a driver library of the same version as the driver",
        "restart the machine, which completes an update of NVIDIA's driver; in a container, remove its package cuda-compat",
        frozenset({803, 804}),
        (
            "SYSTEM_DRIVER_MISMATCH",
            "COMPAT_NOT_SUPPORTED_ON_DEVICE",
            "unsupported display driver / cuda driver combination",
            "forward compatibility was attempted",
        ),
    ),
    CudaFailure(
        "a GPU that answers its driver",
        "run nvidia-smi; if it fails too, or after the machine was suspended, restart the machine",
        frozenset({214, 999}),
        ("ECC_UNCORRECTABLE", "UNKNOWN", "uncorrectable ecc error", "(unknown error)"),
    ),
    CudaFailure(
        "work that the GPU can finish",
        "start the program again, because CUDA cannot go on in this process; if it fails again, report it with what"
        " sana-export doctor --json prints",
        frozenset({700, 702, 710, 714, 715, 716, 717, 718, 719}),
        (
            "ILLEGAL_ADDRESS",
            "LAUNCH_TIMEOUT",
            "LAUNCH_FAILED",
            "LaunchFailure",
            "MISALIGNED_ADDRESS",
            "illegal memory access",
            "unspecified launch failure",
            "misaligned address",
        ),
    ),
)


def find_failure(text: str) -> CudaFailure | None:
    """The kind of error that `text` reports. None if it reports no error of CUDA's that the user can do something about."""
    return next((failure for failure in _FAILURES if failure.is_in(text)), None)
