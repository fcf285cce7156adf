"""One GPU as a session needs it: memory, copies, events, times and captured graphs, on one stream.

It uses cuda-core and functions of the driver. `CudaDevice` needs a GPU and has not been run on one. The tests of its users have a
device with the same interface in host memory (tests/support/host_device.py).
"""

from __future__ import annotations

import contextlib
import ctypes
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

#: TensorRT needs the address of a tensor to be a multiple of this.
ALIGNMENT = 256
#: The driver's errors: a pattern, what is wanted, and the fix. The first match counts.
_ERRORS = (
    (
        "OUT_OF_MEMORY",
        "more free GPU memory",
        "use --memory staged, generate fewer images at once, or close other programs that use the GPU",
    ),
    ("INSUFFICIENT_DRIVER", "a newer NVIDIA driver", "update NVIDIA's driver; sana-export doctor shows the installed one"),
    ("DRIVER_MISMATCH", "a newer NVIDIA driver", "update NVIDIA's driver; sana-export doctor shows the installed one"),
    (
        "",
        "an NVIDIA GPU and its driver",
        "install NVIDIA's driver (sana-export doctor shows what was found), or use --backend onnxruntime",
    ),
)


@dataclass(frozen=True, eq=False)
class Memory:
    """A block of device memory. It is freed when nothing refers to it any more."""

    #: Where it starts.
    address: int
    #: Its size in bytes.
    size: int
    #: The object that frees the memory when it is deleted.
    owner: Any = field(repr=False)


class Device(Protocol):
    """A GPU with one stream, which does its work in the order of the calls."""

    #: The GPU's name.
    name: str
    #: Its compute capability ("8.9").
    compute_capability: str

    @property
    def stream(self) -> int:
        """The handle of the stream that work is enqueued to at the moment."""
        ...

    def enter(self) -> None:
        """Make this the current device of the calling thread."""
        ...

    def allocate(self, size: int) -> Memory:
        """A new block of memory."""
        ...

    def upload(self, address: int, values: Array) -> None:
        """Copy an array to the device. The array may be changed or freed as soon as this returns."""
        ...

    def download(self, address: int, values: Array) -> None:
        """Wait for all enqueued work, then fill the array `values` from the device."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes from the address `source` to `target`."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Enqueue that `size` bytes are set to zero."""
        ...

    def record_event(self) -> Any:
        """An event that is reached when all work enqueued so far is done."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """The time between two events. Waits for the second one."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` enqueues as a graph, without running it. Calling the result enqueues the graph."""
        ...

    def wait(self) -> None:
        """Wait for all enqueued work."""
        ...

    def free_bytes(self) -> int:
        """The device's free memory."""
        ...


class CudaDevice:
    """The GPU `index`, through cuda-core. Raises DependencyError if the package, the driver or the GPU is missing."""

    def __init__(self, index: int = 0) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device as CoreDevice
            from cuda.core import EventOptions, LegacyPinnedMemoryResource
        except ImportError as error:
            raise DependencyError(
                "running engines needs the package cuda-core, which is not installed",
                found=error,
                wanted="cuda-core",
                fix='pip install "sana-export[tensorrt-rtx]"',
            ) from error
        self._driver, self._entered = driver, _Entered()
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
        if not self._entered.yes:
            self._device.set_current()
            self._entered.yes = True

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
        # If the garbage collector freed device memory now, the graph would capture that.
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


class _Entered(threading.local):
    """Whether the calling thread has made the device its current one."""

    yes = False


@dataclass(eq=False)
class _Pinned:
    """Pinned host memory, which the GPU copies from and to."""

    #: Where it starts.
    address: int
    #: Its bytes.
    array: npt.NDArray[np.uint8]
    #: The object that frees the memory when it is deleted.
    owner: Any
    #: The event of the copy that uses it. None if there is no such copy.
    busy_until: Any = None

    @property
    def free(self) -> bool:
        """Whether it can be used for another copy."""
        return self.busy_until is None or bool(self.busy_until.is_done)


class _PinnedPool:
    """Pinned buffers, by their size, which is a power of two."""

    def __init__(self, resource: Any) -> None:
        self._resource = resource
        self._buffers: dict[int, list[_Pinned]] = {}

    def take(self, size: int) -> _Pinned:
        """A free buffer of at least `size` bytes."""
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
    """The error for a failure while `doing` something. `found` is what the driver said."""
    text = (str(found).splitlines() or [type(found).__name__])[0]
    _, wanted, fix = next(row for row in _ERRORS if row[0] in str(found).upper().replace(" ", "_"))
    return DependencyError(f"the GPU cannot be used: {doing} failed", found=text, wanted=wanted, fix=fix)


@contextlib.contextmanager
def _cuda_errors(doing: str) -> Iterator[None]:
    """Turn every exception into a DependencyError, because those of cuda-core have no common base."""
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
