"""Faults to plant in cuda.py, to see that the checks of `CudaDevice` find them on the stand-in."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

MODULE = "sana_export.runtime.backends.cuda"


@dataclass(frozen=True)
class Fault:
    """A passage of cuda.py that is replaced."""

    passage: str
    replacement: str
    #: The test of test_gpu_cuda.py that finds the fault.
    found_by: str


FAULTS = {
    "a download does not wait": Fault(
        "self._stream.sync()\n                piece[:]",
        "piece[:]",
        "test_values_come_back",
    ),
    "a pinned buffer is used again before its copy is done": Fault(
        "self._staging.give_back(staged, self._stream.record())",
        "self._staging.give_back(staged)",
        "test_values_come_back",
    ),
    "two threads get one pinned buffer": Fault(
        "return kept.pop(index)",
        "return kept[index]",
        "test_threads_share_the_pinned_memory",
    ),
    "memory is freed while it is used": Fault(
        "return Memory(int(buffer.handle), size, _Owned(buffer, self._thread))",
        "return Memory(int(buffer.handle), size, None)",
        "test_values_come_back",
    ),
    "memory is freed during a capture": Fault(
        "if self._thread.capturing is not None:\n            self._thread.dropped",
        "if False:\n            self._thread.dropped",
        "test_memory_that_is_dropped_during_a_capture_is_freed_outside_it",
    ),
    "memory is never freed": Fault(
        "return Memory(int(buffer.handle), size, _Owned(buffer, self._thread))",
        "return Memory(int(buffer.handle), size, (buffer, self.__dict__.setdefault('leaked', []).append(buffer)))",
        "test_values_come_back",
    ),
    "a copy is run instead of captured": Fault(
        "cuMemcpyDtoDAsync(target, source, size, self.stream)",
        "cuMemcpyDtoDAsync(target, source, size, self._handle)",
        "test_a_captured_graph_reads_its_inputs_anew",
    ),
    "a capture is broken by other threads": Fault(
        'begin_building(mode="thread_local")',
        'begin_building(mode="global")',
        "test_other_threads_work_during_a_capture",
    ),
    "a capture takes up the work of other threads": Fault(
        "self._device.create_graph_builder()",
        "self._stream.create_graph_builder()",
        "test_other_threads_work_during_a_capture",
    ),
    "the end of a failed capture hides its error": Fault(
        "with contextlib.suppress(Exception):\n                    builder.close()",
        "builder.close()",
        "test_a_failed_capture_names_the_first_error_of_the_driver",
    ),
    "the time between events is asked for too early": Fault(
        "            end.sync()\n",
        "",
        "test_time_passes",
    ),
    "the device is current only in the first thread": Fault(
        "        self._device.set_current()\n",
        "        if threading.current_thread() is threading.main_thread():\n            self._device.set_current()\n",
        "test_graphs_run_in_other_threads",
    ),
    "the device is made current once in each thread": Fault(
        "        self._device.set_current()\n",
        "        self._thread.entered = getattr(self._thread, 'entered', False) or self._device.set_current() or True\n",
        "test_a_thread_s_current_device_may_change_between_calls",
    ),
    "work of other threads counts as captured": Fault(
        "class _ThreadState(threading.local):",
        "class _ThreadState:",
        "test_other_threads_work_during_a_capture",
    ),
    "memory that is kept for later does not count as free": Fault(
        "held.reserved_mem_current - held.used_mem_current if held else 0",
        "0",
        "test_freed_memory_counts_as_free_and_goes_back_to_the_driver_when_trimmed",
    ),
    "memory that is kept for later is not given back": Fault(
        "self._check(self._driver.cuMemPoolTrimTo(self._pool.handle, 0))",
        "pass",
        "test_freed_memory_counts_as_free_and_goes_back_to_the_driver_when_trimmed",
    ),
}


def plant(name: str) -> None:
    """Replace the module by one with the fault `name`. Nothing may have imported it yet."""
    assert MODULE not in sys.modules
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.origin is not None
    fault = FAULTS[name]
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert source.count(fault.passage) == 1, f"cuda.py has changed: it has {source.count(fault.passage)} times {fault.passage!r}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    exec(compile(source.replace(fault.passage, fault.replacement), spec.origin, "exec"), vars(module))
