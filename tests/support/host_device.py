"""A device in host memory with the order of a CUDA stream: enqueued work runs when somebody waits for it.

It is stricter than a GPU, to find mistakes: memory is filled with rubbish when it is allocated and, in stream order, when it is
freed. During a capture, nothing may be allocated, uploaded or freed.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from sana_export.errors import DependencyError
from sana_export.runtime.backends.cuda import ALIGNMENT, Memory

#: The current device of each thread.
CURRENT = threading.local()
RUBBISH = 0xFB  # as float16 and float32 large and negative, as an index far outside


class HostDevice:
    name = "Host GPU 1"
    compute_capability = "8.9"
    stream = 77

    def __init__(self, capacity: int = 1 << 40) -> None:
        self.capacity, self.used, self.peak = capacity, 0, 0
        self.kept = 0  # what it has taken from the driver, used or not
        self.live: dict[int, int] = {}
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.uploaded = self.downloaded = self.captures = self.replays = self.enqueued = 0

    def enter(self) -> None:
        CURRENT.device = self

    @property
    def is_current(self) -> bool:
        """Whether the calling thread's work goes to this device."""
        return getattr(CURRENT, "device", None) is self

    def enqueue(self, work: Callable[[], None]) -> None:
        self.enqueued += 1
        (self.queue if self.capturing is None else self.capturing).append(work)

    def wait(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def allocate(self, size: int) -> Memory:
        assert self.capturing is None, "memory was allocated during a capture"
        if self.used + size > self.capacity:
            raise DependencyError("the GPU cannot be used", found="CUDA_ERROR_OUT_OF_MEMORY", wanted="more free GPU memory")
        buffer = np.full(size + ALIGNMENT, RUBBISH, np.uint8)
        address = -(-buffer.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.used += size
        self.peak = max(self.peak, self.used)
        self.kept = max(self.kept, self.used)
        self.live[address] = size
        memory = Memory(address, size, buffer)

        def spoil() -> None:
            buffer.fill(RUBBISH)
            del self.live[address]

        def free() -> None:
            assert self.capturing is None, "memory was freed during a capture"
            self.used -= size
            self.queue.append(spoil)

        weakref.finalize(memory, free).atexit = False
        return memory

    def inside(self, address: int, size: int) -> None:
        """Fail unless the bytes belong to allocated memory."""
        assert any(begin <= address and address + size <= begin + length for begin, length in self.live.items()), "foreign memory"

    def host(self, address: int, size: int) -> int:
        """Where the host finds the bytes at an address of the device."""
        self.inside(address, size)
        return address

    def upload(self, address: int, values: Any) -> None:
        assert self.capturing is None, "an upload was captured: it would bring the same values every time"
        self.inside(address, values.nbytes)
        content = np.ascontiguousarray(values).tobytes()
        self.uploaded += len(content)
        self.enqueue(lambda: ctypes.memmove(address, content, len(content)) and None)

    def download(self, address: int, values: Any) -> None:
        self.inside(address, values.nbytes)
        self.wait()
        self.downloaded += values.nbytes
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        self.inside(target, size)
        self.inside(source, size)
        self.enqueue(lambda: ctypes.memmove(target, source, size) and None)

    def clear(self, address: int, size: int) -> None:
        self.inside(address, size)
        self.enqueue(lambda: ctypes.memset(address, 0, size) and None)

    def record_event(self) -> list[float]:
        """A list that gets the time when the queue reaches it."""
        reached: list[float] = []
        self.enqueue(lambda: reached.append(perf_counter()))
        return reached

    def seconds(self, start: list[float], end: list[float]) -> float:
        self.wait()
        return end[0] - start[0]

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        assert self.capturing is None
        self.capturing = captured = []
        try:
            work()
        finally:
            self.capturing = None
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            self.queue.extend(captured)

        return replay

    def free_bytes(self) -> int:
        return self.capacity - self.used

    def trim(self) -> None:
        self.wait()
        self.kept = self.used
