"""`CudaDevice` on the stand-in for the CUDA driver, with the interface that the tests of engines use in `HostDevice`."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from sana_export.errors import DependencyError
from sana_export.runtime.backends.cuda import CudaDevice, Memory

DRIVER = ctypes.CDLL("libcuda.so.1")
DRIVER.stand_in_bytes.restype = ctypes.c_void_p
DRIVER.stand_in_bytes.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Alive(NamedTuple):
    """What exists on the stand-in."""

    #: Bytes of device memory.
    memory: int
    #: Bytes that the memory pool has taken from the driver, used or not.
    reserved: int
    #: Bytes of pinned host memory.
    pinned: int
    graphs: int
    executable_graphs: int
    streams: int
    events: int


def alive() -> Alive:
    """What exists after all enqueued work has run."""
    counts = (ctypes.c_longlong * len(Alive._fields))()
    DRIVER.stand_in_alive(counts)
    return Alive(*counts)


def misuses() -> str:
    """What was done so far that a program must not do although a driver would let it, a line for each."""
    text = ctypes.create_string_buffer(8192)
    DRIVER.stand_in_misuses(text, len(text))
    return text.value.decode()


class DriverDevice(CudaDevice):
    """Counts like `HostDevice`, and runs what tests enqueue as host functions of the stream."""

    def __init__(self, capacity: int = 1 << 40) -> None:
        super().__init__()
        self.name = "Host GPU 1"
        self.capacity, self.used, self.peak = capacity, 0, 0
        self.capturing: list[Any] | None = None
        self.uploaded = self.downloaded = self.captures = self.replays = self.enqueued = 0
        # What enqueued work needs until it has run, and the errors of host functions, through which no exception can pass.
        self.pending: list[Any] = []
        self.raised: list[BaseException] = []

    @property
    def is_current(self) -> bool:
        """Whether the calling thread has a context."""
        context = ctypes.c_void_p()
        return DRIVER.cuCtxGetCurrent(ctypes.byref(context)) == 0 and bool(context.value)

    @property
    def kept(self) -> int:
        """What the memory pool, which all devices share, has taken from the driver, used or not."""
        return alive().reserved

    @property
    def queue(self) -> list[Any]:
        """What is enqueued and has not been waited for."""
        return self.pending

    def enqueue(self, work: Callable[[], None]) -> None:
        self.enqueued += 1

        def call(_: Any) -> None:
            try:
                work()
            except BaseException as error:
                self.raised.append(error)

        function = HostFunction(call)
        (self.pending if self.capturing is None else self.capturing).append(function)
        assert DRIVER.cuLaunchHostFunc(ctypes.c_void_p(self.stream), function, None) == 0

    def inside(self, address: int, size: int) -> None:
        self.host(address, size)

    def host(self, address: int, size: int) -> int:
        found = DRIVER.stand_in_bytes(address, size)
        assert found, "foreign memory"
        return int(found)

    def allocate(self, size: int) -> Memory:
        if self.used + size > self.capacity:
            raise DependencyError("the GPU cannot be used", found="CUDA_ERROR_OUT_OF_MEMORY", wanted="more free GPU memory")
        memory = super().allocate(size)
        self.used += size
        self.peak = max(self.peak, self.used)
        this = weakref.ref(self)  # the memory may live longer than the device

        def free() -> None:
            if (device := this()) is not None:
                device.used -= size

        weakref.finalize(memory, free).atexit = False
        return memory

    def upload(self, address: int, values: Any) -> None:
        self.uploaded += values.nbytes
        super().upload(address, values)

    def download(self, address: int, values: Any) -> None:
        self.downloaded += values.nbytes
        self.wait()
        super().download(address, values)

    def wait(self) -> None:
        enqueued = len(self.pending)  # other threads may enqueue more meanwhile
        super().wait()
        del self.pending[:enqueued]
        if self.raised:
            raise self.raised.pop(0)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.capturing = captured = []
        try:
            replay = super().capture(work)
        finally:
            self.capturing = None
        self.captures += 1

        def counted() -> None:
            self.replays += 1
            self.pending.append(captured)
            replay()

        return counted

    def free_bytes(self) -> int:
        return self.capacity - self.used
