"""A pytest plugin for an environment without the packages of the extra `export`: a test that imports one of them is skipped.

Such tests compare with PyTorch or diffusers, or write checkpoints. `make test-lowest` uses it: `-p tests.support.runtime_only`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

#: The modules that are not there.
MISSING = ("torch", "diffusers", "transformers", "safetensors", "onnxscript", "peft")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    report = yield
    if report.outcome == "failed" and (name := _missing(str(report.longrepr))):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: no module {name}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if report.outcome == "failed" and (name := _missing(str(call.excinfo and call.excinfo.exconly()))):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: no module {name}")
    return report


def _missing(text: str) -> str | None:
    """The name of a missing module of the extra that an error names."""
    return next((name for name in MISSING if f"No module named '{name}" in text), None)
