from typing import Any

import pytest

from sana_export.progress import Progress
from sana_export.trt.progress import Phases, progress_monitor


def test_nested_phases_add_up_to_one_fraction() -> None:
    phases = Phases()

    assert phases.start("build", None, 4) == 0
    assert phases.step("build") == 0.25
    assert phases.start("compile", "build", 2) == 0.25
    assert phases.step("compile") == pytest.approx(0.25 + 0.25 / 2)
    assert phases.start("kernel", "compile", 10) == pytest.approx(0.375)
    assert phases.step("kernel") == pytest.approx(0.25 + 0.25 * (1 + 1 / 10) / 2)
    phases.finish("kernel")
    assert phases.finish("build") == 1.0


def test_the_fraction_never_goes_back() -> None:
    phases = Phases()
    phases.start("build", None, 2)
    phases.start("inner", "build", 1)
    assert phases.step("inner") == 0.5
    assert phases.finish("inner") == 0.5  # before the outer step is counted


def test_more_steps_than_announced_do_not_pass_one() -> None:
    phases = Phases()
    phases.start("build", None, 1)
    assert [phases.step("build") for _ in range(3)] == [1.0, 1.0, 1.0]
    assert phases.step("never started") == 1.0


class FakeModule:
    class IProgressMonitor:
        pass


def test_monitor_reports_each_event_and_stops_when_asked() -> None:
    seen: list[Progress] = []
    stop = False
    monitor: Any = progress_monitor(FakeModule, "denoiser", seen.append, lambda: stop)

    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0) is True
    stop = True
    assert monitor.step_complete("build", 1) is False
    monitor.phase_finish("build")

    assert seen == [Progress("denoiser: build", fraction, 1) for fraction in (0.0, 0.5, 1.0, 1.0)]


def test_what_the_callback_raises_ends_the_build_and_is_kept() -> None:
    def fail(progress: Progress) -> None:
        raise BrokenPipeError("nobody listens")

    monitor: Any = progress_monitor(FakeModule, "denoiser", fail, lambda: False)

    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0) is False
    assert isinstance(monitor.raised, BrokenPipeError)
