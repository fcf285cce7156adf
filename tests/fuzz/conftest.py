"""Profiles of the property-based tests, and the number of inputs that they generated.

`make test` runs a few inputs for each test, the same ones every time. `make fuzz` sets $SANA_EXPORT_FUZZ to the number of inputs of
each test, and generates new ones every time. No input may take longer than `MOST_SECONDS`: one that does is a failure, not a hang.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

#: Inputs for each test in `make test`.
FEW = 40
#: The longest time that one input may take.
MOST_SECONDS = 20

_COMMON: dict[str, Any] = {
    "deadline": None,  # `_watched` ends an input that hangs, which a deadline does not; the first input of a test may import a lot
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    "print_blob": True,
}
_MANY = os.environ.get("SANA_EXPORT_FUZZ")
settings.register_profile("ci", max_examples=FEW, derandomize=True, database=None, **_COMMON)
settings.register_profile("fuzz", max_examples=int(_MANY or FEW), **_COMMON)
settings.load_profile("fuzz" if _MANY else "ci")


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise AssertionError in the block when it has run for `MOST_SECONDS`."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise AssertionError(f"one input took longer than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _watched(test: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
    """`test` with a limit on the time of each input. It counts the inputs in `count`."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        with _time_limit():
            return test(*args, **kwargs)

    return run


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    handle = getattr(pyfuncitem.obj, "hypothesis", None)
    if handle is None:
        yield
        return
    count, test = [0], handle.inner_test
    handle.inner_test = _watched(test, count)
    try:
        yield
    finally:
        handle.inner_test = test
        pyfuncitem.user_properties.append(("inputs", count[0]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The inputs of each test, and of all."""
    counts = {
        report.nodeid: dict(report.user_properties)["inputs"]
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, ())
        if report.when == "call" and "inputs" in dict(report.user_properties)
    }
    if not counts:
        return
    terminalreporter.section("generated inputs")
    if _MANY:
        for test, count in counts.items():
            terminalreporter.write_line(f"{count:>9,}  {test}")
    terminalreporter.write_line(f"{sum(counts.values()):>9,}  in {len(counts)} tests")
