"""Which GPU takes which backend: the table, and the documents that repeat it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sana_export.gpu_support import GPU_SUPPORT, RTX_CAPABILITIES, RTX_PORTABLE, RTX_PROVIDER, backends_for, unsupported_reason
from sana_export.runtime.backends import BACKENDS, ENGINE_BACKENDS

ROOT = Path(__file__).parents[1]


def test_compute_capabilities_of_tensorrt_rtx() -> None:
    assert RTX_CAPABILITIES == ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
    assert RTX_PORTABLE == ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert RTX_PROVIDER == ("8.6", "8.9", "12.0", "12.1")


@pytest.mark.parametrize(
    ("capability", "engines"),
    [
        ("12.1", {"tensorrt", "tensorrt-rtx"}),
        ("12.0", {"tensorrt", "tensorrt-rtx"}),
        ("10.0", {"tensorrt"}),
        ("9.0", {"tensorrt"}),
        ("8.0", {"tensorrt", "tensorrt-rtx"}),
        ("7.5", {"tensorrt", "tensorrt-rtx"}),
        # Not in the table: TensorRT is expected to support what is newer, and supports nothing that is older.
        ("13.0", {"tensorrt"}),
        ("7.0", set()),
    ],
)
def test_backends_of_a_gpu(capability: str, engines: set[str]) -> None:
    found = backends_for(capability)
    assert set(found) & set(ENGINE_BACKENDS) == engines
    assert ("onnxruntime-tensorrt-rtx" in found) == (capability in RTX_PROVIDER)
    others = set(BACKENDS) - set(found) - {"onnxruntime-tensorrt-rtx"}
    assert others == set(ENGINE_BACKENDS) - engines  # the others run everywhere
    assert [name for name in found if name in ENGINE_BACKENDS] == [name for name in ENGINE_BACKENDS if name in engines]


def test_reasons_name_what_is_supported() -> None:
    assert unsupported_reason("tensorrt-rtx", "8.9") is None
    assert unsupported_reason("tensorrt-rtx", "9.0") == (
        "TensorRT-RTX does not support compute capability 9.0, only 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    )
    assert unsupported_reason("tensorrt", "7.0") == "TensorRT does not support compute capability 7.0, only 7.5 and later"


@pytest.mark.parametrize("document", ["README.md", "docs/deploy.md"])
def test_the_documents_table_says_the_same(document: str) -> None:
    told: dict[str, str] = {}
    for row in (ROOT / document).read_text("utf-8").splitlines():
        if numbers := re.search(r"\| (\d+\.\d([,;] \d+\.\d)*) \|", row):
            told |= dict.fromkeys(re.findall(r"\d+\.\d", numbers[1]), row)
    assert told.keys() == GPU_SUPPORT.keys()
    for capability, row in told.items():
        named = "`tensorrt-rtx`" in row.replace("not `tensorrt-rtx`", "")
        assert named == (capability in RTX_CAPABILITIES), row
        assert ("--compute-capability" in row) == (capability in set(RTX_CAPABILITIES) - set(RTX_PORTABLE)), row
        for name in GPU_SUPPORT[capability].cards.split(", "):
            assert name in row
