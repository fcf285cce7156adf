"""A pytest plugin for a process that runs on the stand-in for the CUDA driver (`run_tests`).

Tests that make a `HostDevice` get a `DriverDevice`. A test fails if it misused the driver, or if device memory that it allocated
exists after it. CUDA_STAND_IN_FAULT plants a fault of faults.py in `CudaDevice`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.support.cuda_driver.faults import plant

if fault := os.environ.get("CUDA_STAND_IN_FAULT"):
    plant(fault)  # before the module is imported

from tests.support import host_device
from tests.support.cuda_driver.device import DriverDevice, alive, misuses

host_device.HostDevice = DriverDevice


@pytest.fixture(autouse=True)
def _driver_is_used_well(request: pytest.FixtureRequest) -> Iterator[None]:
    before, misused = alive().memory, misuses()
    yield
    request.node.funcargs.clear()  # pytest would keep the test's own objects a little longer
    gc.collect()
    assert misuses() == misused, "the driver was misused"
    assert alive().memory <= before, "device memory was not freed"
