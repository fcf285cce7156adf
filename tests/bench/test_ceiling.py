"""The measured ceiling, and the GPU's power and clocks."""

from __future__ import annotations

import contextlib
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sana_export.bench import gpu_watch
from sana_export.bench.gpu_watch import GpuWatch
from sana_export.bench.work.ceiling import better, measure_rates
from sana_export.bench.work.count import Rates
from sana_export.runtime.backends.torch import cpu_threads


def test_the_ceiling_is_above_what_plain_calls_reach() -> None:
    rates = measure_rates("cpu", "fp32", threads=1)
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    source = torch.ones(64 << 20, dtype=torch.uint8)
    times: dict[str, list[float]] = {"mm": [], "clone": []}
    with cpu_threads(1):
        for _ in range(5):
            for name, call in (("mm", lambda: left @ right), ("clone", source.clone)):
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
    # Half: a small product may sit in a faster cache, and the machine may have slowed down since.
    assert rates.flop > 0.5 * 2 * 256**3 / min(times["mm"])
    assert rates.bytes > 0.25 * 2 * source.nbytes / min(times["clone"])
    assert rates.flop < 1e15
    assert rates.bytes < 1e13
    assert rates.precision == "fp32"


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    inside = []
    with contextlib.suppress(ValueError), cpu_threads(before + 1):
        inside.append(torch.get_num_threads())
        raise ValueError
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def test_the_better_of_two_measurements() -> None:
    one, other = Rates(3.0, 1.0, "fp16", "a"), Rates(2.0, 4.0, "fp16", "b")
    assert better(one, other) == Rates(3.0, 4.0, "fp16", "a")
    assert better(None, other) is other
    assert better(one, None) is one
    assert better(None, None) is None


class FakeNvml(ModuleType):
    """The management library with one GPU, whose power rises by 10 W with each question."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: int = 1) -> None:
        super().__init__("fake_nvml")
        self.gpus, self.watts, self.held = gpus, 90, 1 << 30

    def nvmlInit(self) -> None:
        if not self.gpus:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        return f"handle of {name}"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle of GPU-1"
        self.watts += 10
        return self.watts * 1000

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 2505, 2: 10501}[kind]

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 0x4 | 0x1  # power cap, and idle, which does not count

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self.held += 1 << 20
        return [SimpleNamespace(pid=1, usedGpuMemory=5 << 30), SimpleNamespace(pid=77, usedGpuMemory=self.held)]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "fake_nvml", fake)
    monkeypatch.setattr(gpu_watch, "gpu_uuid", lambda index: f"GPU-{index}")
    return fake


def test_power_and_clocks_belong_to_the_backend_whose_turn_it_was(nvml: FakeNvml) -> None:
    watch = GpuWatch("fake_nvml", index=1)
    with watch.turn("ours", 77):
        time.sleep(0.2)
    nvml.watts = 290
    with watch.turn("eager", 12):
        pass
    ours, eager = watch.summary("ours"), watch.summary("eager")
    assert ours is not None
    assert eager is not None
    assert ours["power_w"]["min"] == 100
    assert 110 <= ours["power_w"]["median"] < ours["power_w"]["max"] < 290
    assert eager["power_w"] == {"median": 300, "min": 300, "max": 300}
    assert (ours["sm_clock_mhz"]["median"], ours["memory_clock_mhz"]["median"]) == (2505, 10501)
    assert ours["temperature_c"] is None
    assert ours["slowed_by"] == ["power cap"]
    assert ours["process_bytes"] >= (1 << 30) + 3 * (1 << 20)
    assert eager["process_bytes"] is None  # the library does not know its process
    assert watch.summary("never had a turn") is None


def test_without_a_gpu_nothing_is_sampled(nvml: FakeNvml) -> None:
    nvml.gpus = 0
    for module in ("fake_nvml", "no_such_module"):
        watch = GpuWatch(module)
        with watch.turn("ours", 1):
            pass
        assert watch.summary("ours") is None
