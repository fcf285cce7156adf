"""Fixtures: a bundle to damage, and the threads of ONNX Runtime's sessions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the fp32 bundle of `tiny-random` that a test may damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def session_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of every ONNX Runtime session made in this process; 0 is ONNX Runtime's own choice."""
    found: list[int] = []

    class Recorded(onnxruntime.InferenceSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            found.append(self.get_session_options().intra_op_num_threads)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorded)
    return found
