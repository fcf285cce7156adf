"""This package's runtime on one of its backends."""

from __future__ import annotations

from typing import Any

from sana_export.bench.candidates.table import Generated, Job
from sana_export.bench.stages import StageTimes
from sana_export.errors import DependencyError
from sana_export.runtime.backends.base import Loader
from sana_export.runtime.pipeline import SanaRuntime
from sana_export.runtime.results import Timings


class WrongDevice(DependencyError):
    """A backend computes on another device than the workload's, so its times would stand for something else."""


def load(job: Job) -> RuntimeCandidate:
    """The bundle on the job's backend. Raises WrongDevice if it does not compute on the workload's device."""
    return open_candidate(job, job.backend, device=job.device, threads=job.threads)


def open_candidate(job: Job, backend: str | Loader, **settings: Any) -> RuntimeCandidate:
    """The bundle on `backend` with these `settings` of `from_pretrained`. Raises WrongDevice as `load` does."""
    runtime = SanaRuntime.from_pretrained(
        job.bundle,
        backend=backend,
        prompt_cache_bytes=0,  # the rounds draw the same prompts, and eager diffusers encodes them each time
        **settings,
    )
    if (device := runtime.backend.device) != job.workload.device:
        runtime.close()
        raise WrongDevice(
            f"the backend {job.backend} does not compute where the workload runs",
            found=f"{job.backend} on the {device}",
            wanted=f"{job.backend} on the {job.workload.device}",
            fix="sana-export doctor",
        )
    return RuntimeCandidate(job, runtime)


class RuntimeCandidate:
    """A `SanaRuntime` with the workload's settings."""

    def __init__(self, job: Job, runtime: SanaRuntime) -> None:
        self.job, self.runtime = job, runtime
        self.precision = job.precision
        self.description = f"SanaRuntime, {job.precision}, {runtime.backend.name} on the {runtime.backend.device}"

    def generate(self, prompt: str, seed: int) -> Generated:
        result = self.runtime(prompt, seed=seed, **self.job.workload.sampling())
        assert isinstance(result.images, list)  # output_type is "pil"
        return Generated(result.images, stage_times(result.timings))

    def peak_device_bytes(self) -> int | None:
        return None


def stage_times(timings: Timings) -> StageTimes:
    """The runtime's timings (seconds) as stages (milliseconds)."""
    return {
        "text_encoder": [1e3 * timings.text_encoder],
        "context": [1e3 * timings.context],
        "denoise_step": [1e3 * seconds for seconds in timings.denoise],
        "denoise_loop": [1e3 * timings.denoise_loop],
        "vae_decoder": [1e3 * timings.vae_decoder],
    }
