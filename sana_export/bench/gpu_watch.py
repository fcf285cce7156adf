"""Power, clocks, heat and memory of the GPU while each backend has its turn, where NVIDIA's management library answers."""

from __future__ import annotations

import importlib
import logging
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

_PERIOD_SECONDS = 0.05
#: Bits of the reasons for which a GPU lowers its clocks that make a run slower than the card (nvml.h, nvmlClocksThrottleReason*).
_SLOWED_BY = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}


class GpuWatch:
    """Samples the first GPU in a thread of its own during `turn`. Without pynvml, driver or GPU it watches nothing."""

    def __init__(self, module: str = "pynvml") -> None:
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._nvml, self._handle = _open(module)

    @contextmanager
    def turn(self, name: str, process: int) -> Iterator[None]:
        """The turn of the backend `name`, which runs in `process`."""
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
        """power_w, sm_clock_mhz, memory_clock_mhz, temperature_c: median, least and most over the turns of `name`.

        process_bytes: the most device memory that its process held. slowed_by: why the GPU lowered its clocks. Values that the
        library did not tell are None; all is None where it told nothing.
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
        """Device memory of `process`; None where the library does not know the process (as from inside a container)."""
        found = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return next((entry.usedGpuMemory for entry in found if entry.pid == process), None)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or None where this GPU or driver does not support the question."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def _open(module: str) -> tuple[Any, Any]:
    """The library and its handle of the first GPU; None and None where it cannot be used."""
    try:
        nvml = importlib.import_module(module)
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByIndex(0)
    except nvml.NVMLError as error:
        log.debug("the GPU is not watched: %s", error)
        return None, None
