"""Fixtures: the command line in this process, a bundle to damage, and the threads of ONNX Runtime's sessions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from sana_export.cli.main import main
from tests.support.command_line import Cli, Ran


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `sana-export ARGUMENTS...` in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


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
