from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_export.bench.candidates import trace
from sana_export.bench.candidates.table import Job
from sana_export.bench.run import run_bench
from sana_export.bench.workload import Workload
from sana_export.errors import UsageError


@pytest.mark.slow
def test_the_trace_draws_the_same_image(tiny_bundle: Path, tiny_checkpoint: Any) -> None:
    """Two prompts of different lengths with one trace."""
    work = Workload("trace", 64, 96, 2, 4.5, ("a cute 🐼", "一只可爱的熊猫在吃竹子, ink drawing style"), repeats=1)
    found = run_bench(tiny_bundle, tiny_checkpoint, backends=("eager", "trace"), workload=work)
    assert found.failed == {}
    assert found.backends["trace"].agreement is not None
    assert found.agrees
    assert set(found.backends["trace"].stages) == set(found.backends["eager"].stages)


@pytest.mark.slow
def test_sprint_draws_the_same_image_everywhere(sprint_bundle: Path, sprint_checkpoint: Any) -> None:
    """With four steps, for which SanaSprintPipeline needs other arguments."""
    work = Workload("sprint", 64, 96, 4, 4.5, ("a cute 🐼",), repeats=1)
    found = run_bench(sprint_bundle, sprint_checkpoint, backends=("eager", "onnxruntime", "trace"), workload=work)
    assert found.failed == {}
    assert found.agrees


def test_pag_cannot_be_traced() -> None:
    """The candidate says so before it exports anything. tests/bench/test_run.py shows what a report makes of such an error."""
    work = Workload("trace", 64, 64, 1, 4.5, ("x",), pag_scale=2.0, repeats=1)
    job = Job("trace", "bundle", "checkpoint", None, "fp32", False, (), 1, work)
    with pytest.raises(UsageError, match="the plain trace cannot run this workload"):
        trace.prepare(job)
