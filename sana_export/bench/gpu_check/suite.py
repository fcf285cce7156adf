"""Runs all tests that are marked `gpu`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.errors import DependencyError

MARK = "gpu"


def run(context: PartContext, *, where: str = "tests") -> Mapping[str, Any]:
    """Returns outcomes (outcome to number of tests) and tests (all tests).

    Raises CheckFailed if a test failed, DependencyError if there are no tests.
    """
    import pytest

    if not Path(where).exists():
        raise DependencyError(
            "the project's tests are missing",
            found=f"no {where} in {Path.cwd()}",
            wanted="a checkout of the project",
            fix="run make gpu-check in a checkout of the project",
        )
    report = context.work / "gpu-tests.json"
    # Other test files may need packages that only developers have.
    files = [str(path) for path in sorted(Path(where).rglob("test_*.py")) if f"mark.{MARK}" in path.read_text("utf-8")]
    arguments = ["-m", MARK, "-p", "tests.support.json_report", f"--json-report={report}", "-p", "no:xdist", *files]
    code = pytest.main(arguments)
    tests = json.loads(report.read_text("utf-8"))["tests"]
    outcomes = Counter(test["outcome"] for test in tests.values())
    found = {"outcomes": dict(outcomes), "tests": tests}
    context.keep(found)
    if int(code) != 0:
        bad = [name for name, test in tests.items() if test["outcome"] not in ("passed", "skipped")]
        raise CheckFailed(f"pytest ended with {int(code)}: {', '.join(bad) or 'see the log'}")
    return found
