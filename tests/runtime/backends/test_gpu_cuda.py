"""`CudaDevice` on a GPU. `test_cuda.py` runs this file on the stand-in driver too."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sana_export.errors import ArtifactError, DependencyError
from sana_export.runtime.backends.cuda import ALIGNMENT, LARGEST_STAGED, CudaDevice, Memory

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    pytest.importorskip("cuda.core")
    return CudaDevice()


def random_bytes(size: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def uploaded(device: CudaDevice, values: Any) -> Memory:
    memory = device.allocate(values.nbytes)
    device.upload(memory.address, values)
    return memory


def downloaded(device: CudaDevice, memory: Memory) -> Any:
    values = np.full(memory.size, 0xA5, np.uint8)
    device.download(memory.address, values)
    return values


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a thread of its own."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def check_works(device: CudaDevice) -> None:
    """The device still copies, and captures."""
    values = random_bytes(4096, seed=9)
    source, target = uploaded(device, values), device.allocate(4096)
    device.capture(lambda: device.copy(target.address, source.address, 4096))()
    np.testing.assert_array_equal(downloaded(device, target), values)


def test_the_gpu_is_described(device: CudaDevice) -> None:
    assert device.name
    major, minor = map(int, device.compute_capability.split("."))
    assert major >= 5
    assert minor >= 0


@pytest.mark.parametrize("size", [0, 1, 255, 4096, MIB + 3, LARGEST_STAGED, 2 * LARGEST_STAGED + 5])
def test_values_come_back(device: CudaDevice, size: int) -> None:
    values = random_bytes(size)
    wanted = values.copy()
    memory = uploaded(device, values)
    values[:] = 7  # an upload has taken what it needs
    assert memory.address % ALIGNMENT == 0
    np.testing.assert_array_equal(downloaded(device, memory), wanted)


def test_arrays_of_any_order_and_dtype_come_back(device: CudaDevice) -> None:
    values = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32).transpose(2, 0, 1)
    memory = uploaded(device, values)
    found = np.empty(values.shape, np.float32)
    device.download(memory.address, found)
    np.testing.assert_array_equal(found, values)


def test_copies_and_clears_are_done_in_the_order_of_the_calls(device: CudaDevice) -> None:
    values = random_bytes(4096)
    source, target = uploaded(device, values), device.allocate(4096)
    device.clear(target.address, 4096)
    device.copy(target.address, source.address, 1000)
    device.clear(source.address, 4096)
    np.testing.assert_array_equal(downloaded(device, target), np.r_[values[:1000], np.zeros(3096, np.uint8)])
    assert not downloaded(device, source).any()


def test_time_passes(device: CudaDevice) -> None:
    memory = device.allocate(64 * MIB)
    start = device.record_event()
    for _ in range(10):
        device.clear(memory.address, memory.size)
    middle = device.record_event()
    for _ in range(10):
        device.clear(memory.address, memory.size)
    end = device.record_event()
    first, both = device.seconds(start, middle), device.seconds(start, end)
    assert 0 < first < both < 10


def test_a_captured_graph_reads_its_inputs_anew(device: CudaDevice) -> None:
    source, target = device.allocate(4096), device.allocate(4096)
    device.clear(target.address, 4096)
    device.clear(source.address, 4096)

    def work() -> None:
        device.copy(target.address, source.address, 4096)
        device.clear(target.address, 16)

    replay = device.capture(work)
    assert not downloaded(device, target).any(), "a capture must not run the work"
    for seed in (1, 2):
        values = random_bytes(4096, seed)
        device.upload(source.address, values)
        replay()
        np.testing.assert_array_equal(downloaded(device, target), np.r_[np.zeros(16, np.uint8), values[16:]])


def test_graphs_run_in_other_threads(device: CudaDevice) -> None:
    values = random_bytes(4096)
    source, target = uploaded(device, values), device.allocate(4096)
    replay = device.capture(lambda: device.copy(target.address, source.address, 4096))
    in_a_thread(replay)
    np.testing.assert_array_equal(in_a_thread(lambda: downloaded(device, target)), values)


def test_a_thread_s_current_device_may_change_between_calls(device: CudaDevice) -> None:
    """As it does if the thread uses two devices, or a library that makes its own device the current one."""
    from cuda.bindings import driver

    values = random_bytes(4096)
    source, target = uploaded(device, values), device.allocate(4096)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: device.copy(target.address, source.address, 4096),
        device.wait,
        device.free_bytes,
        lambda: device.allocate(16),
        lambda: device.upload(source.address, values),
        device.record_event,
        lambda: device.capture(lambda: device.clear(source.address, 16))(),
    )
    for call in calls:
        assert driver.cuCtxSetCurrent(0) == (driver.CUresult.CUDA_SUCCESS,)
        call()
    np.testing.assert_array_equal(downloaded(device, target), values)


@pytest.mark.parametrize("kind", [ZeroDivisionError, ArtifactError])
def test_a_failed_capture_raises_what_its_work_raised(device: CudaDevice, kind: type[Exception]) -> None:
    memory, error = device.allocate(4096), kind("the reason")

    def work() -> None:
        device.clear(memory.address, 4096)
        raise error

    with pytest.raises(kind) as raised:
        device.capture(work)
    assert raised.value is error
    check_works(device)


def test_a_failed_capture_names_the_first_error_of_the_driver(device: CudaDevice) -> None:
    """What an engine does that cannot be captured: it waits for its stream, which breaks the capture, and then fails."""
    from cuda.bindings import driver

    def work() -> None:
        (status,) = driver.cuStreamSynchronize(device.stream)
        raise ArtifactError("running the engine failed", found=str(status))

    with pytest.raises(ArtifactError, match="STREAM_CAPTURE_UNSUPPORTED"):
        device.capture(work)
    check_works(device)


def test_a_capture_that_the_driver_broke_fails(device: CudaDevice) -> None:
    from cuda.bindings import driver

    with pytest.raises(DependencyError, match="capturing a CUDA graph failed") as raised:
        device.capture(lambda: driver.cuStreamSynchronize(device.stream) and None)
    assert "install" not in str(raised.value)
    check_works(device)


@pytest.mark.parametrize("call", ["allocate", "upload", "download", "record_event", "wait", "trim", "capture"])
def test_what_no_graph_can_have_is_refused_during_a_capture(device: CudaDevice, call: str) -> None:
    memory = device.allocate(16)
    calls: dict[str, Callable[[], Any]] = {
        "allocate": lambda: device.allocate(16),
        "upload": lambda: device.upload(memory.address, np.zeros(16, np.uint8)),
        "download": lambda: device.download(memory.address, np.zeros(16, np.uint8)),
        "record_event": device.record_event,
        "wait": device.wait,
        "trim": device.trim,
        "capture": lambda: device.capture(lambda: None),
    }
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        device.capture(lambda: calls[call]() and None)
    check_works(device)


def test_other_threads_work_during_a_capture(device: CudaDevice) -> None:
    """What they upload arrives at once, and is not in the graph."""
    values, later = random_bytes(4096, 1), random_bytes(4096, 2)
    source, target, other = device.allocate(4096), device.allocate(4096), device.allocate(4096)
    found = []

    def meanwhile() -> None:
        new = uploaded(device, values)
        device.copy(other.address, new.address, 4096)
        found.append(downloaded(device, other))

    def work() -> None:
        device.copy(target.address, source.address, 4096)
        in_a_thread(meanwhile)

    replay = device.capture(work)
    np.testing.assert_array_equal(found[0], values)
    device.upload(source.address, later)
    device.clear(other.address, 4096)
    replay()
    np.testing.assert_array_equal(downloaded(device, target), later)
    assert not downloaded(device, other).any()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["by the capturing thread", "by another thread"])
def test_memory_that_is_dropped_during_a_capture_is_freed_outside_it(device: CudaDevice, elsewhere: bool) -> None:
    values = random_bytes(4096)
    source, target = uploaded(device, values), device.allocate(4096)
    dropped = [device.allocate(MIB)]

    def drop() -> None:
        dropped.clear()
        gc.collect()

    def work() -> None:
        device.copy(target.address, source.address, 2048)
        in_a_thread(drop) if elsewhere else drop()
        device.copy(target.address + 2048, source.address + 2048, 2048)

    replay = device.capture(work)
    for _ in range(2):
        device.clear(target.address, 4096)
        replay()
        np.testing.assert_array_equal(downloaded(device, target), values)


def test_nothing_is_collected_during_a_capture_whatever_other_captures_end(device: CudaDevice) -> None:
    second_asks, first_is_done, collected = threading.Event(), threading.Event(), []

    def second() -> None:
        second_asks.set()
        device.capture(lambda: first_is_done.wait(5) and collected.append(gc.isenabled()))

    thread = threading.Thread(target=second)

    def first() -> None:
        thread.start()
        second_asks.wait(5)
        time.sleep(0.2)  # the second one begins its capture, or waits for its turn

    device.capture(first)
    first_is_done.set()
    thread.join()
    assert collected == [False]
    assert gc.isenabled()


def test_a_gpu_whose_memory_ran_out_works_on(device: CudaDevice) -> None:
    with pytest.raises(DependencyError, match="more free GPU memory") as raised:
        device.allocate(1 << 44)
    assert "install" not in str(raised.value)
    check_works(device)


def test_threads_share_the_pinned_memory(device: CudaDevice) -> None:
    """Each upload and download of four threads has the thread's own values."""
    wrong = []

    def work(seed: int) -> None:
        memory = device.allocate(4096)
        for count in range(200):
            values = np.full(1024, seed * 1000 + count, np.float32)
            device.upload(memory.address, values)
            found = np.empty_like(values)
            device.download(memory.address, found)
            if not np.array_equal(found, values):
                wrong.append((seed, count))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the threads take turns within a copy, on any machine
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def driver_free() -> int:
    """What the driver reports as free, in bytes."""
    from cuda.bindings import driver

    status, free, _total = driver.cuMemGetInfo()
    assert not int(status)
    return int(free)


def test_freed_memory_counts_as_free_and_goes_back_to_the_driver_when_trimmed(device: CudaDevice) -> None:
    device.trim()
    ours, drivers = device.free_bytes(), driver_free()
    memory = device.allocate(256 * MIB)
    device.wait()
    assert device.free_bytes() <= ours - 256 * MIB
    del memory
    device.wait()
    assert device.free_bytes() >= ours - 32 * MIB
    device.trim()
    # Other programs may use the GPU too, so this is not exact.
    assert driver_free() >= drivers - 32 * MIB
