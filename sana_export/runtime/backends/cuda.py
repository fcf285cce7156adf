"""One GPU as a session needs it: memory, copies, events, times and captured graphs, on one stream.

It uses cuda-core and functions of the driver. The tests run it on a stand-in for NVIDIA's driver (tests/support/cuda_driver). Most
tests of its users have a device with the same interface in host memory (tests/support/host_device.py).
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

from sana_export.cuda_errors import CudaFailure, find_failure
from sana_export.errors import DependencyError, SanaExportError, first_line
from sana_export.formats.arrays import Array
from sana_export.installation import install_command

#: TensorRT needs the address of a tensor to be a multiple of this.
ALIGNMENT = 256
#: Larger copies from and to the host go through pinned memory piece by piece, so that it stays small.
LARGEST_STAGED = 1 << 24
#: Held by the thread that turned the garbage collector off.
_COLLECTOR = threading.RLock()
#: For an error that nothing is known about.
_UNKNOWN = CudaFailure(
    "a GPU and a driver that work",
    "run it again; if it fails again, report it with what sana-export doctor --json prints",
    codes=frozenset(),
    texts=(),
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
        """Capture what `work` enqueues as a graph, without running it. Calling the result enqueues the graph.

        `work` runs engines, copies and clears, nothing else. If it raises an error, that is what the caller gets.
        """
        ...

    def wait(self) -> None:
        """Wait for all enqueued work."""
        ...

    def free_bytes(self) -> int:
        """The memory that can be allocated: what the device has free, and what freed memory is kept for later."""
        ...

    def trim(self) -> None:
        """Wait for all enqueued work, then give memory that is kept for later back to the driver, for whoever needs it."""
        ...


class CudaDevice:
    """The GPU `index`, through cuda-core. Raises DependencyError if the package, the driver or the GPU is missing.

    Threads may use it together. A capture is on a stream of its own, so that the work of other threads stays out of the graph.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device as CoreDevice
            from cuda.core import DeviceMemoryResource, EventOptions, LegacyPinnedMemoryResource
        except ImportError as error:
            raise DependencyError(
                "running engines needs the package cuda-core, which is not installed",
                found=error,
                wanted="cuda-core",
                fix=install_command("tensorrt-rtx"),
            ) from error
        self._driver, self._thread = driver, _ThreadState()
        with _cuda_errors("opening the GPU"):
            self._device = CoreDevice(index)
            self.enter()
            self._stream = self._device.create_stream()
            self._timed = EventOptions(timing_enabled=True)
            self._staging = _Staging(LegacyPinnedMemoryResource())
            # A GPU without memory pools has another kind of resource, which keeps nothing.
            resource = self._device.memory_resource
            self._pool = resource if isinstance(resource, DeviceMemoryResource) else None
            self.name = str(self._device.name)
            self.compute_capability = "{}.{}".format(*self._device.compute_capability)
        self._handle = int(self._stream.handle)

    @property
    def stream(self) -> int:
        return self._handle if self._thread.capturing is None else self._thread.capturing

    def enter(self) -> None:
        # Always: another device, or another library, may have made itself the thread's current one since the last call.
        self._device.set_current()

    def allocate(self, size: int) -> Memory:
        self._enter_outside_capture()
        with _cuda_errors(f"allocating {size} bytes on the GPU"):
            buffer = self._device.allocate(max(size, 1), stream=self._stream)
        return Memory(int(buffer.handle), size, _Owned(buffer, self._thread))

    def upload(self, address: int, values: Array) -> None:
        self._enter_outside_capture()
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with _cuda_errors("copying to the GPU"):
            for start in range(0, content.size, LARGEST_STAGED):
                piece = content[start : start + LARGEST_STAGED]
                staged = self._staging.take(piece.size)
                staged.array[: piece.size] = piece
                self._check(self._driver.cuMemcpyHtoDAsync(address + start, staged.address, piece.size, self._handle))
                self._staging.give_back(staged, self._stream.record())

    def download(self, address: int, values: Array) -> None:
        self._enter_outside_capture()
        content = values.reshape(-1).view(np.uint8)
        with _cuda_errors("copying from the GPU"):
            for start in range(0, content.size, LARGEST_STAGED):
                piece = content[start : start + LARGEST_STAGED]
                staged = self._staging.take(piece.size)
                self._check(self._driver.cuMemcpyDtoHAsync(staged.address, address + start, piece.size, self._handle))
                self._stream.sync()
                piece[:] = staged.array[: piece.size]
                self._staging.give_back(staged)

    def copy(self, target: int, source: int, size: int) -> None:
        self.enter()
        self._check(self._driver.cuMemcpyDtoDAsync(target, source, size, self.stream))

    def clear(self, address: int, size: int) -> None:
        self.enter()
        self._check(self._driver.cuMemsetD8Async(address, 0, size, self.stream))

    def record_event(self) -> Any:
        self._enter_outside_capture()
        with _cuda_errors("recording an event"):
            return self._stream.record(options=self._timed)

    def seconds(self, start: Any, end: Any) -> float:
        self._enter_outside_capture()
        with _cuda_errors("waiting for the GPU"):
            end.sync()
            return float(end - start) / 1e3

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self._enter_outside_capture()
        # Pinned memory must not be freed during a capture.
        with _no_garbage_collection():
            with _cuda_errors("starting the capture of a CUDA graph"):
                builder = self._device.create_graph_builder().begin_building(mode="thread_local")
            self._thread.capturing, self._thread.dropped = int(builder.stream.handle), []
            try:
                work()
                with _cuda_errors("capturing a CUDA graph"):
                    graph = builder.end_building().complete()
            finally:
                self._thread.capturing = None
                # Ends a capture that failed. That it failed is no news: the error to see is the first one.
                with contextlib.suppress(Exception):
                    builder.close()
                self._thread.dropped = []

        def replay() -> None:
            self._enter_outside_capture()
            with _cuda_errors("running a captured CUDA graph"):
                graph.launch(self._stream)

        return replay

    def wait(self) -> None:
        self._enter_outside_capture()
        with _cuda_errors("waiting for the GPU"):
            self._stream.sync()

    def free_bytes(self) -> int:
        self.enter()
        free, _total = self._check(self._driver.cuMemGetInfo())
        with _cuda_errors("asking for the GPU's free memory"):
            held = self._pool.attributes if self._pool else None
            return int(free) + (held.reserved_mem_current - held.used_mem_current if held else 0)

    def trim(self) -> None:
        self.wait()
        self._staging.trim()
        if self._pool:
            self._check(self._driver.cuMemPoolTrimTo(self._pool.handle, 0))

    def _enter_outside_capture(self) -> None:
        """Make this the current device, for a call that cannot be part of a graph."""
        if self._thread.capturing is not None:
            raise RuntimeError("this cannot be part of a CUDA graph: only engines, copies and clears can be captured")
        self.enter()

    def _check(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = answer
        if int(status):
            raise cuda_error("a call of the CUDA driver", status.name)
        return tuple(values)


class _ThreadState(threading.local):
    """What a device knows about the calling thread."""

    #: The handle of the stream that the thread captures, if it does.
    capturing: int | None = None
    #: The buffers that were dropped during the capture.
    dropped: list[Any]


class _Owned:
    """A buffer of cuda-core, which is freed when this is dropped, but not during a capture of the thread that drops it.

    The driver takes no cuMemFreeAsync from a thread that captures, not even on another stream, and the call breaks the capture.
    """

    def __init__(self, buffer: Any, thread: _ThreadState) -> None:
        self._buffer, self._thread = buffer, thread

    def __del__(self) -> None:
        if self._thread.capturing is not None:
            self._thread.dropped.append(self._buffer)


@dataclass(eq=False)
class _Pinned:
    """Pinned host memory, which the GPU copies from and to."""

    #: Where it starts.
    address: int
    #: Its bytes.
    array: npt.NDArray[np.uint8]
    #: The object that frees the memory when it is deleted.
    owner: Any
    #: The event of the last copy that used it. None if there is none.
    busy_until: Any = None

    @property
    def idle(self) -> bool:
        """Whether it can be used for another copy."""
        return self.busy_until is None or bool(self.busy_until.is_done)


class _Staging:
    """Pinned buffers that copies go through, by their size, which is a power of two. A buffer belongs to one copy at a time."""

    def __init__(self, resource: Any) -> None:
        self._resource, self._lock = resource, threading.Lock()
        self._kept: dict[int, list[_Pinned]] = {}

    def take(self, size: int) -> _Pinned:
        """A buffer of at least `size` bytes, which belongs to the caller until it is given back."""
        length = 1 << math.ceil(math.log2(max(size, ALIGNMENT)))
        with self._lock:
            kept = self._kept.setdefault(length, [])
            for index, buffer in enumerate(kept):
                if buffer.idle:
                    return kept.pop(index)
        with _cuda_errors(f"allocating {length} bytes of pinned host memory"):
            owner = self._resource.allocate(length)
        address = int(owner.handle)
        return _Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address)), owner)

    def give_back(self, buffer: _Pinned, busy_until: Any = None) -> None:
        """Keep `buffer` for other copies. The event `busy_until` is reached when the copy that used it is done."""
        buffer.busy_until = busy_until
        with self._lock:
            self._kept[buffer.array.size].append(buffer)

    def trim(self) -> None:
        """Free the buffers that no copy is using."""
        with self._lock:
            self._kept = {length: [buffer for buffer in kept if not buffer.idle] for length, kept in self._kept.items()}


def cuda_error(doing: str, found: object) -> DependencyError:
    """The error for a failure while `doing` something. `found` is what the driver said."""
    failure = find_failure(str(found)) or _UNKNOWN
    return DependencyError(
        f"the GPU cannot be used: {doing} failed", found=first_line(found), wanted=failure.wanted, fix=failure.fix
    )


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
    """Turn the process's garbage collector off. One thread at a time: otherwise the first to end would turn it on for all."""
    with _COLLECTOR:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()
