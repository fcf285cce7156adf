"""What is read of mapped files does not stay in the process's memory while the check of an export reads it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from sana_export.export import mapped_pages
from sana_export.export.mapped_pages import clean_regions, returning_pages

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is resident")

SIZE = 32 << 20


def resident(path):
    """The bytes of the maps of `path` that are in this process's memory."""
    parts = re.split(r"^([0-9a-f]+-[0-9a-f]+ .*)$", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    bodies = (body for head, body in zip(parts[1::2], parts[2::2], strict=True) if str(path) in head)
    return sum(int(re.search(r"^Rss:\s*(\d+) kB", body, re.MULTILINE)[1]) << 10 for body in bodies)


@pytest.fixture
def mapped(tmp_path):
    """Two mapped files, whose pages were read: one in a folder, one beside it."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    paths = tmp_path / "in" / "deep" / "data", tmp_path / "inside"
    for path in paths:
        np.arange(SIZE // 8).tofile(path)
    return [(path, np.memmap(path, np.int64, "r")) for path in paths]


def test_pages_are_returned_while_the_block_reads_and_after_it(tmp_path, mapped, monkeypatch):
    """Without waiting for time to pass: each return is one that the test has seen."""
    (path, values), (other, others) = mapped
    total = SIZE // 8 * (SIZE // 8 - 1) // 2
    assert others.sum() == total
    returned, return_pages = threading.Semaphore(0), mapped_pages.return_pages

    def counted(regions):
        return_pages(regions)
        returned.release()

    monkeypatch.setattr(mapped_pages, "return_pages", counted)
    with returning_pages(tmp_path / "in", period=0.001):
        assert values.sum() == total
        for _ in range(2):  # one may have begun before the sum ended
            assert returned.acquire(timeout=60)
        while returned.acquire(blocking=False):
            pass
        assert returned.acquire(timeout=60)
        assert resident(path) == 0
        assert values.sum() == total
    assert resident(path) == 0
    assert resident(other) == SIZE
    assert values.sum() == total


def test_what_was_written_to_a_private_map_is_kept(tmp_path, mapped):
    (path, _), _ = mapped
    written, read = np.memmap(path, np.int64, "c"), np.memmap(path, np.int64, "c")
    assert len(clean_regions(tmp_path / "in")) == 3
    written[7] = -5
    assert len(clean_regions(tmp_path / "in")) == 2
    with returning_pages(tmp_path / "in"):
        assert (written[7], read[7]) == (-5, 7)
    assert (written[7], read[7]) == (-5, 7)


def test_the_maps_of_a_folder_are_those_of_its_files(tmp_path, mapped):
    assert [length for _, length in clean_regions(tmp_path / "in")] == [SIZE]
    assert [length for _, length in clean_regions(tmp_path)] == [SIZE, SIZE]
    assert clean_regions(tmp_path / "i") == []


def test_an_error_in_the_block_is_its_own(tmp_path, mapped):
    with pytest.raises(ZeroDivisionError), returning_pages(tmp_path):
        assert 1 / 0


CHECK_IN_A_CHILD = """
import sys, torch
from pathlib import Path
from sana_export.contract import GraphSpec, TensorSpec
from sana_export.environment import peak_rss_bytes
from sana_export.export.example_inputs import CHECK_SIZES
from sana_export.export.mapped_pages import returning_pages
from sana_export.export.onnx import check_values, export_onnx, run_module
from sana_export.graphs.numerics import NUMERICS, Linear
from sana_export.graphs.storage import WeightFile, stored_in

torch.set_num_threads(1)
rows = ("batch", 64, 2048)
spec = GraphSpec("deep", (TensorSpec("input", "float16", rows),), (TensorSpec("y", "float16", rows),))
path = Path(sys.argv[1], "model.onnx")
with WeightFile(path.with_name("model.onnx.data")) as weights, torch.no_grad():
    with stored_in(weights):
        layer = lambda: Linear(torch.randn(2048, 2048) / 45, None, NUMERICS["float16"])
        module = torch.nn.Sequential(*(layer() for _ in range(32)))
    export_onnx(module, spec, path, weights)
    weights.release()
    before = peak_rss_bytes()
    with returning_pages(path.parent):
        examples = run_module(module, spec, CHECK_SIZES)
    check_values(path, spec, examples, "fp16")
    print(peak_rss_bytes() - before, weights.bytes)
"""


@pytest.mark.slow
def test_a_check_needs_less_memory_than_the_weights(tmp_path):
    """How much less depends on how long the thread that returns pages waits for a core."""
    run = subprocess.run([sys.executable, "-c", CHECK_IN_A_CHILD, tmp_path], capture_output=True, text=True, check=True)
    grown, written = map(int, run.stdout.split()[-2:])
    assert written == 32 * 2 * 2048 * 2048
    assert grown < 0.7 * written
