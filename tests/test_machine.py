"""The GPUs of this machine, in CUDA's order."""

from __future__ import annotations

import ctypes
import subprocess
import uuid
from typing import Any

import pytest

from sana_export import machine
from sana_export.errors import UsageError
from sana_export.machine import Gpu, ask_cuda, find_cuda_error, gpu_compute_capability, gpu_names, gpu_state
from sana_export.trt import compatibility
from tests.support import cuda_driver


class Driver:
    """A driver's library with two GPUs. nvidia-smi lists them in another order."""

    gpus = ((b"NVIDIA A100", 8, 0, 80 << 30), (b"NVIDIA GeForce RTX 4090", 8, 9, 24 << 30))
    error = 0

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuGetErrorName(self, status: int, name: Any) -> int:
        known = {100: b"CUDA_ERROR_NO_DEVICE", 802: b"CUDA_ERROR_SYSTEM_NOT_READY"}
        name._obj.value = known.get(status)
        return 0 if status in known else 1

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = self.gpus[device.value][0]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.gpus[device.value][{75: 1, 76: 2}[attribute]]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        size._obj.value = self.gpus[device.value][3]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    monkeypatch.setattr(machine, "ask_cuda", ask_cuda.__wrapped__)
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 0, "560.35.03\n560.35.03\n", "")
    )
    return made


def test_gpus_are_in_the_order_of_cuda(driver: Driver) -> None:
    assert machine.find_gpus() == (
        Gpu("NVIDIA A100", "8.0", 80 << 30, "560.35.03"),
        Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, "560.35.03"),
    )
    assert [gpu_compute_capability(index) for index in (0, 1, 2, -1)] == ["8.0", "8.9", None, None]


def test_nvidia_smi_is_not_needed(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", missing)
    assert [gpu.driver for gpu in machine.find_gpus()] == [None, None]
    assert gpu_state() == []


@pytest.mark.parametrize(
    ("error", "name"), [(100, "CUDA_ERROR_NO_DEVICE"), (802, "CUDA_ERROR_SYSTEM_NOT_READY"), (12345, "CUDA error 12345")]
)
def test_a_driver_that_finds_no_gpu_says_why(driver: Driver, error: int, name: str) -> None:
    assert find_cuda_error() is None
    driver.error = error
    assert machine.find_gpus() == ()
    assert gpu_compute_capability() is None
    assert find_cuda_error() == name
    assert compatibility.detect_host().cuda_error == name


def test_without_a_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine.find_gpus() == ()
    assert find_cuda_error() is None


def test_the_real_calls_are_those_of_a_driver(driver_library: Any) -> None:
    """On the stand-in for the driver, which has one GPU."""
    code = "from sana_export.machine import ask_cuda, gpu_uuid; print(ask_cuda(), gpu_uuid(0), gpu_uuid(1))"
    done = cuda_driver.run(driver_library, ["-c", code])
    assert done.stdout.startswith("((Gpu(name='Stand-in GPU', compute_capability='8.9', memory_bytes=4294967296,"), done.stderr
    assert done.stdout.split()[-2:] == [f"GPU-{uuid.UUID(bytes=b'stand-in, no gpu')}", "None"]
    done = cuda_driver.run(driver_library, ["-c", code], CUDA_STAND_IN_INIT="803")
    assert done.stdout == "((), 'CUDA_ERROR_SYSTEM_DRIVER_MISMATCH') None None\n", done.stderr


def test_names_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_gpus", lambda: (Gpu("NVIDIA H100", "9.0", 80 << 30, "570.1"), Gpu("an NVIDIA GPU", "8.9")))
    assert gpu_names() == ["NVIDIA H100, 570.1", "an NVIDIA GPU"]


def test_engines_are_judged_by_the_gpu_that_they_run_on(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpu.name for gpu in compatibility.detect_host().gpus] == ["NVIDIA A100"]
    assert [gpu.name for gpu in compatibility.detect_host(1).gpus] == ["NVIDIA GeForce RTX 4090"]
    with pytest.raises(UsageError, match="there is no GPU 2") as caught:
        compatibility.detect_host(2)
    assert caught.value.found == "0: NVIDIA A100, 1: NVIDIA GeForce RTX 4090"
    driver.error = 802
    with pytest.raises(UsageError, match="there is no GPU 0") as caught:
        compatibility.detect_host(0)
    assert caught.value.found == "CUDA_ERROR_SYSTEM_NOT_READY"
