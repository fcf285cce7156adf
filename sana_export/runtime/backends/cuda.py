"""One GPU in the few words that a session needs: memory, copies, order, time and graphs of work, on one stream.

Over cuda-core and the driver's functions. `CudaDevice` needs a GPU and has not been run on one; the tests of what is built on it
use a device of the same interface in the host's memory (tests/support/host_device.py).
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sana_export.errors import DependencyError, SanaExportError
from sana_export.formats.arrays import Array

#: Bytes: TensorRT wants the address of a tensor to be a multiple of this.
ALIGNMENT = 256
#: What the driver says, and what that means: a pattern, what is wanted, and what mends it.
_ERRORS = (
    (
        "OUT_OF_MEMORY",
        "more free GPU memory",
        "take --memory staged, ask for fewer images at once, or close what else uses the GPU",
    ),
    ("INSUFFICIENT_DRIVER", "a newer NVIDIA driver", "update NVIDIA's driver; sana-export doctor shows the one here"),
    ("DRIVER_MISMATCH", "a newer NVIDIA driver", "update NVIDIA's driver; sana-export doctor shows the one here"),
    ("", "an NVIDIA GPU and its driver", "install NVIDIA's driver (sana-export doctor), or take --backend onnxruntime"),
)


@dataclass(frozen=True, eq=False)
class Memory:
    """`size` bytes of device memory from `address` on, given back when nothing refers to it any more."""

    address: int
    size: int
    owner: Any = field(repr=False)


class Device(Protocol):
    """A GPU with one stream: what is asked of it happens in the order of the calls, and `wait` waits for all of it."""

    name: str
    compute_capability: str

    @property
    def stream(self) -> int:
        """The handle that work is enqueued to now."""
        ...

    def enter(self) -> None:
        """Make this device the calling thread's."""
        ...

    def allocate(self, size: int) -> Memory: ...

    def upload(self, address: int, values: Array) -> None:
        """Copy an array to the device; it may be changed or freed at once."""
        ...

    def download(self, address: int, values: Array) -> None:
        """Fill an array from the device, once all work before is done."""
        ...

    def copy(self, target: int, source: int, size: int) -> None: ...

    def clear(self, address: int, size: int) -> None:
        """Set bytes to zero."""
        ...

    def record_event(self) -> Any:
        """A point in the order of the work."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to another, once the work before the latter is done."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` enqueues, without doing it, as a graph; calling the result enqueues that."""
        ...

    def wait(self) -> None: ...

    def free_bytes(self) -> int:
        """Of the device's memory."""
        ...


class CudaDevice:
    """GPU `index` through cuda-core. Raises DependencyError where the package, the driver or the GPU is missing."""

    def __init__(self, index: int = 0) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device as CoreDevice
            from cuda.core import EventOptions, LegacyPinnedMemoryResource
        except ImportError as error:
            raise DependencyError(
                "running engines needs a package that is not installed",
                found=error,
                wanted="cuda-core",
                fix='pip install "sana-export[tensorrt-rtx]"',
            ) from error
        self._driver, self._entered = driver, threading.local()
        with _cuda_errors("opening the GPU"):
            self._device = CoreDevice(index)
            self.enter()
            self._stream = self._device.create_stream()
            self._timed = EventOptions(timing_enabled=True)
            self._pinned = _PinnedPool(LegacyPinnedMemoryResource())
            self.name = str(self._device.name)
            self.compute_capability = "{}.{}".format(*self._device.compute_capability)
        self._handle = int(self._stream.handle)

    @property
    def stream(self) -> int:
        return self._handle

    def enter(self) -> None:
        if not getattr(self._entered, "done", False):
            self._device.set_current()
            self._entered.done = True

    def allocate(self, size: int) -> Memory:
        self.enter()
        with _cuda_errors(f"allocating {size} bytes on the GPU"):
            buffer = self._device.allocate(max(size, 1), stream=self._stream)
        return Memory(int(buffer.handle), size, buffer)

    def upload(self, address: int, values: Array) -> None:
        self.enter()
        values = np.ascontiguousarray(values)
        if not values.nbytes:
            return
        with _cuda_errors("copying to the GPU"):
            staged = self._pinned.take(values.nbytes)
            staged.array[: values.nbytes] = values.reshape(-1).view(np.uint8)
            self._check(self._driver.cuMemcpyHtoDAsync(address, staged.address, values.nbytes, self._handle))
            staged.busy_until = self._stream.record()

    def download(self, address: int, values: Array) -> None:
        self.enter()
        with _cuda_errors("copying from the GPU"):
            staged = self._pinned.take(values.nbytes)
            self._check(self._driver.cuMemcpyDtoHAsync(staged.address, address, values.nbytes, self._handle))
            self._stream.sync()
        values.reshape(-1).view(np.uint8)[:] = staged.array[: values.nbytes]

    def copy(self, target: int, source: int, size: int) -> None:
        self.enter()
        self._check(self._driver.cuMemcpyDtoDAsync(target, source, size, self._handle))

    def clear(self, address: int, size: int) -> None:
        self.enter()
        self._check(self._driver.cuMemsetD8Async(address, 0, size, self._handle))

    def record_event(self) -> Any:
        self.enter()
        return self._stream.record(options=self._timed)

    def seconds(self, start: Any, end: Any) -> float:
        end.sync()
        return float(end - start) / 1e3

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.enter()
        builder = self._stream.create_graph_builder()
        # Memory that the garbage collector frees meanwhile would be freed by the graph.
        with _cuda_errors("capturing a CUDA graph"), _no_garbage_collection():
            builder.begin_building(mode="thread_local")
            try:
                self._handle = int(builder.stream.handle)
                work()
            finally:
                self._handle = int(self._stream.handle)
                builder.end_building()
            graph = builder.complete()

        def replay() -> None:
            self.enter()
            graph.launch(self._stream)

        return replay

    def wait(self) -> None:
        self.enter()
        with _cuda_errors("waiting for the GPU"):
            self._stream.sync()

    def free_bytes(self) -> int:
        self.enter()
        free, _total = self._check(self._driver.cuMemGetInfo())
        return int(free)

    def _check(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = answer
        if int(status):
            raise cuda_error("a call of the CUDA driver", str(status))
        return tuple(values)


@dataclass(eq=False)
class _Pinned:
    """Host memory that the GPU copies from and to; in use until the event `busy_until`, if there is one."""

    address: int
    array: npt.NDArray[np.uint8]
    owner: Any
    busy_until: Any = None

    @property
    def free(self) -> bool:
        return self.busy_until is None or bool(self.busy_until.is_done)


class _PinnedPool:
    """Pinned buffers by the power of two that they are large."""

    def __init__(self, resource: Any) -> None:
        self._resource = resource
        self._buffers: dict[int, list[_Pinned]] = {}

    def take(self, size: int) -> _Pinned:
        import ctypes

        length = 1 << math.ceil(math.log2(max(size, ALIGNMENT)))
        kept = self._buffers.setdefault(length, [])
        for buffer in kept:
            if buffer.free:
                buffer.busy_until = None
                return buffer
        owner = self._resource.allocate(length)
        address = int(owner.handle)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))
        kept.append(_Pinned(address, array, owner))
        return kept[-1]


def cuda_error(doing: str, found: object) -> DependencyError:
    """The error for what the driver said while `doing`."""
    text = (str(found).splitlines() or [type(found).__name__])[0]
    _, wanted, fix = next(row for row in _ERRORS if row[0] in str(found).upper().replace(" ", "_"))
    return DependencyError(f"the GPU cannot be used: {doing} failed", found=text, wanted=wanted, fix=fix)


@contextlib.contextmanager
def _cuda_errors(doing: str) -> Iterator[None]:
    """Turn what cuda-core raises into a DependencyError: it has no base class for a missing driver and a failing call."""
    try:
        yield
    except (SanaExportError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise cuda_error(doing, error) from error


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
