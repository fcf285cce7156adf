from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest

from sana_export.bench.load_meter import busy_seconds
from sana_export.environment import peak_rss_bytes
from sana_export.machine import describe_machine, describe_versions, memory_bytes

CHILD = """
from sana_export.environment import peak_rss_bytes
before = peak_rss_bytes()
held = b"x" * (200 << 20)
during = peak_rss_bytes()
del held
print(before, during, peak_rss_bytes())
"""


def test_peak_memory_is_the_process_s_own() -> None:
    """A child of a large parent starts small, and memory that it freed stays in its peak."""
    held = np.ones(400 << 20, dtype=np.uint8)
    assert peak_rss_bytes() >= held.nbytes
    output = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    before, during, after = map(int, output.split())
    assert before < 200 << 20
    assert during - before == pytest.approx(200 << 20, rel=0.05)
    assert after == pytest.approx(during, rel=0.01)


def test_busy_seconds_count_work() -> None:
    before, worked = busy_seconds(), time.process_time() + 0.5
    while time.process_time() < worked:
        pass
    after = busy_seconds()
    assert before is not None
    assert after is not None
    assert after - before >= 0.45


def test_the_machine_and_versions_are_described() -> None:
    machine, versions = describe_machine(), describe_versions()
    assert set(machine) == {"cpu", "cores", "memory", "gpu", "os", "python"}
    assert machine["cores"] >= 1
    assert machine["memory"] == memory_bytes() > peak_rss_bytes()
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert "sana_export" in versions
