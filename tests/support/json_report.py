"""A pytest plugin: `-p tests.support.json_report --json-report=FILE` writes the outcome of every test.

`sana_export.bench.gpu_check` uses it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sana_export.machine import describe_machine, describe_versions

SCHEMA_VERSION = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-report", metavar="FILE", help="write the outcome of every test to this file")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--json-report"):
        config.pluginmanager.register(JsonReport(Path(path)), "json-report")


class JsonReport:
    """Collects the outcome of every test. A run without tests does not fail: there may be none for this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "reason": None})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed" and test["outcome"] == "passed":
            test["outcome"] = report.outcome if report.when == "call" or report.skipped else "error"
            test["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK
        document = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "exit_code": int(session.exitstatus),
            "tests": self.tests,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
