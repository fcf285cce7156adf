"""What an error says, in one line."""

from __future__ import annotations

import pytest

from sana_export.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("CUDA error 2\nat cuda_call.cc:129"), "CUDA error 2"),
        (RuntimeError("\n  out of memory \r\nmore"), "out of memory"),
        (MemoryError(), "MemoryError"),
        (ValueError(" \n"), "ValueError"),
        ("status 1\nstatus 2", "status 1"),
    ],
)
def test_first_line(error: object, line: str) -> None:
    assert first_line(error) == line
