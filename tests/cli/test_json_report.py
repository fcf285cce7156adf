"""The pytest plugin `json_report`: every test with its outcome; a run without tests does not fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_good():
    pass

def test_bad():
    assert 1 == 2

@pytest.mark.skip(reason="no such GPU")
def test_left_out():
    pass

@pytest.fixture
def broken():
    raise RuntimeError("no driver")

def test_cannot_start(broken):
    pass
"""


def report(folder: Path, *options: str) -> tuple[int, Any]:
    (folder / "test_some.py").write_text(TESTS)
    path = folder / "out" / "report.json"
    line = [sys.executable, "-m", "pytest", "-p", "tests.support.json_report", f"--json-report={path}", "--rootdir", str(folder)]
    done = subprocess.run([*line, *options, str(folder)], cwd=ROOT, capture_output=True, timeout=120, check=False)
    return done.returncode, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("test", "outcome", "reason"),
    [
        ("test_good", "passed", None),
        ("test_bad", "failed", "assert 1 == 2"),
        ("test_left_out", "skipped", "no such GPU"),
        ("test_cannot_start", "error", "no driver"),
    ],
)
def test_outcomes(test: str, outcome: str, reason: str | None, tmp_path: Path) -> None:
    code, document = report(tmp_path)
    assert code == document["exit_code"] == 1
    assert {"machine", "versions", "created", "schema_version"} <= set(document)
    (found,) = [entry for name, entry in document["tests"].items() if name.endswith(f"::{test}")]
    assert found["outcome"] == outcome
    assert (found["reason"] is None) if reason is None else (reason in found["reason"])


def test_no_test_for_this_machine_is_no_failure(tmp_path: Path) -> None:
    code, document = report(tmp_path, "-m", "gpu", "-o", "markers=gpu")
    assert code == document["exit_code"] == 0
    assert document["tests"] == {}
