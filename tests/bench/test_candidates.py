"""A job as JSON, and the GPU and threads that candidates take from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sana_export.bench.candidates import Candidate, Job, runtime
from sana_export.bench.candidates.eager import torch_device
from sana_export.bench.workload import Workload

WORK = Workload("test", 64, 96, 2, 4.5, ("a", "二"), device="cuda")
JOB = Job(
    "tensorrt",
    "bundle",
    "checkpoint",
    "fp16",
    "fp16",
    True,
    (1, 2),
    3,
    WORK,
    loras=(("style.safetensors", 0.5, (("attn2", 0.25),)),),
    device=1,
)


def test_a_job_survives_json() -> None:
    for job in (JOB, replace(JOB, device=None, loras=())):
        assert Job.from_json(json.loads(json.dumps(job.as_json()))) == job


@pytest.mark.parametrize(
    ("device", "index", "name"), [("cpu", None, "cpu"), ("cpu", 1, "cpu"), ("cuda", None, "cuda"), ("cuda", 2, "cuda:2")]
)
def test_the_device_of_eager(device: str, index: int | None, name: str) -> None:
    assert torch_device(replace(JOB, device=index, workload=replace(WORK, device=device))) == name


def test_the_runtime_gets_the_job_s_device_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Backend:
        name, device = "tensorrt", "cuda"

    class Runtime:
        backend = Backend()

        @classmethod
        def from_pretrained(cls, bundle: str, **options: Any) -> Runtime:
            seen.update(options, bundle=bundle)
            return cls()

    monkeypatch.setattr(runtime, "SanaRuntime", Runtime)
    candidate: Candidate = runtime.load(JOB)
    assert seen == {"bundle": "bundle", "backend": "tensorrt", "device": 1, "threads": 3, "prompt_cache_bytes": 0}
    assert candidate.description == "SanaRuntime, fp16, tensorrt on the cuda"
