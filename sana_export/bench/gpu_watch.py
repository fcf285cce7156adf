"""Power, clocks, temperature and memory of the GPU during each backend's turns, from NVIDIA's management library (NVML)."""

from __future__ import annotations

import importlib
import logging
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sana_export.machine import gpu_uuid

log = logging.getLogger(__name__)

_PERIOD_SECONDS = 0.05
#: NVML's bits for the reasons why a GPU lowers its clocks (nvml.h, nvmlClocksThrottleReason*), without those of normal operation.
_SLOWED_BY = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}


class GpuWatch:
    """Samples one GPU from a thread during `turn`. Does nothing if pynvml, the driver or the GPU is missing.

    `index` is CUDA's index of the GPU. NVML has another order, so the GPU is found by its name.
    """

    def __init__(self, module: str = "pynvml", index: int = 0) -> None:
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._nvml, self._handle = _open(module, index)

    @contextmanager
    def turn(self, name: str, process: int) -> Iterator[None]:
        """Sample while the backend `name` has its turn in `process`."""
        if self._nvml is None:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(self._samples.setdefault(name, []), process, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def summary(self, name: str) -> dict[str, Any] | None:
        """What was sampled during the turns of `name`. None if there are no samples; a value is None if the GPU does not report it.

        power_w, sm_clock_mhz, memory_clock_mhz, temperature_c: median, min and max. process_bytes: the peak device memory of its
        process. slowed_by: why the GPU lowered its clocks.
        """
        samples = self._samples.get(name)
        if not samples:
            return None
        result: dict[str, Any] = {}
        for key in ("power_w", "sm_clock_mhz", "memory_clock_mhz", "temperature_c"):
            values = [sample[key] for sample in samples if sample[key] is not None]
            result[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
        held = [sample["process_bytes"] for sample in samples if sample["process_bytes"] is not None]
        bits = {bit for sample in samples for bit in _SLOWED_BY if (sample["reasons"] or 0) & bit}
        return {**result, "process_bytes": max(held, default=None), "slowed_by": sorted({_SLOWED_BY[bit] for bit in bits})}

    def _watch(self, samples: list[dict[str, Any]], process: int, over: threading.Event) -> None:
        while True:
            samples.append(self._sample(process))
            if over.wait(_PERIOD_SECONDS):
                return

    def _sample(self, process: int) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return {
            "power_w": None if power is None else power / 1e3,
            "sm_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "reasons": self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            "process_bytes": self._ask(lambda: self._held(process)),
        }

    def _held(self, process: int) -> int | None:
        """Device memory of `process`. None if the library does not know the process, for example from inside a container."""
        found = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return next((entry.usedGpuMemory for entry in found if entry.pid == process), None)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or None if this GPU or driver does not support the question."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def _open(module: str, index: int) -> tuple[Any, Any]:
    """The library and its handle of the GPU that CUDA numbers `index`. None and None if it cannot be used."""
    name = gpu_uuid(index)
    if name is None:
        return None, None
    try:
        nvml = importlib.import_module(module)
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError as error:
        log.debug("the GPU is not watched: %s", error)
        return None, None
