"""Runs tests that are marked `gpu`, those of one backend or of the device itself."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.errors import DependencyError

MARK = "gpu"
#: The environment variable that names the backend whose tests run.
BACKEND_VARIABLE = "SANA_EXPORT_GPU_TESTS_BACKEND"


class Results:
    """A pytest plugin that keeps the outcome of every test as soon as it is known: the part may be ended before the last one."""

    def __init__(self, context: PartContext) -> None:
        self._context = context
        #: Test to its outcome, seconds, and reason.
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "reason": None})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed" and test["outcome"] == "passed":
            test["outcome"] = report.outcome if report.when == "call" or report.skipped else "error"
            test["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else shorten(report.longreprtext)
        if report.when == "teardown":
            self._context.keep(self.found())

    def found(self) -> dict[str, Any]:
        """outcomes (outcome to number of tests) and tests."""
        return {"outcomes": dict(Counter(test["outcome"] for test in self.tests.values())), "tests": self.tests}


def shorten(traceback: str) -> str:
    """The lines of pytest's text that say what was raised, and where. The rest is source code of every package in between."""
    lines = traceback.strip().splitlines()
    raised = [line for line in lines if re.match(r"E( |$)", line)]
    return "\n".join([*raised, lines[-1]]) if raised else traceback


def run(context: PartContext, *, file: str, backend: str | None = None, where: str = "tests") -> Mapping[str, Any]:
    """Run the tests in the files named `file` below `where`, for `backend` or for all. Returns what `Results.found` does.

    Raises CheckFailed if a test failed or nothing was collected, and DependencyError if `where` does not exist.
    """
    import pytest

    if not Path(where).exists():
        raise DependencyError(
            "the project's tests are missing",
            found=f"no {where} in {Path.cwd()}",
            wanted="a checkout of the project",
            fix="run make gpu-check in a checkout of the project",
        )
    if backend is not None:
        os.environ[BACKEND_VARIABLE] = backend  # this process runs nothing else
    results = Results(context)
    files = [str(path) for path in sorted(Path(where).rglob(file))]
    code = pytest.main(["-m", MARK, "-p", "no:xdist", *files], plugins=[results])
    if int(code) != 0:
        bad = [name for name, test in results.tests.items() if test["outcome"] not in ("passed", "skipped")]
        raise CheckFailed(f"pytest ended with {int(code)}: {', '.join(bad) or 'see the log'}")
    return results.found()
