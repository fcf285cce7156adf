"""Backends for tests, named "tests.support.fake_candidates:function". Most have no model and fail in some way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from sana_export.bench.candidates.runtime import RuntimeCandidate
from sana_export.bench.candidates.table import Candidate, Generated, Job
from sana_export.errors import DependencyError
from sana_export.runtime.pipeline import SanaRuntime

#: Environment variable with the path of the file that `notes_turns` writes its calls to.
LOG = "FAKE_BACKENDS_LOG"
#: Environment variable with the number of extra runs of the denoiser of `slowed`. 0.25 means one extra run every fourth time.
SLOWER = "FAKE_BACKENDS_SLOWER"


class FakeCandidate:
    """Draws one color. `before` runs at the start of each call."""

    precision = "fp32"

    def __init__(self, name: str, before: Callable[[int], None] = lambda calls: None) -> None:
        self.description, self.before, self.calls = f"fake {name}", before, 0

    def generate(self, prompt: str, seed: int) -> Generated:
        self.before(self.calls)
        self.calls += 1
        image = Image.new("RGB", (8, 8), (seed, 0, 0))
        return Generated([image], {"denoise_step": [1.0, 2.0, 9.0], "denoise_loop": [12.0]})

    def peak_device_bytes(self) -> int | None:
        return None


def _note(name: str) -> Callable[[int], None]:
    def before(calls: int) -> None:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{name}{calls} ")

    return before


def notes_turns(job: Job) -> Candidate:
    return FakeCandidate("one", _note("a"))


def notes_turns_too(job: Job) -> Candidate:
    return FakeCandidate("two", _note("b"))


def cannot_load(job: Job) -> Candidate:
    raise FileNotFoundError("no weights for the fake")


def lacks_a_package(job: Job) -> Candidate:
    raise DependencyError("no such package")


def raises_later(job: Job) -> Candidate:
    def before(calls: int) -> None:
        if calls == 1:
            raise ValueError("the second call is too much")

    return FakeCandidate("raises", before)


def is_killed_later(job: Job) -> Candidate:
    def before(calls: int) -> None:
        if calls == 1:
            os.write(1, b"about to die\n")  # what a library prints must not be read as an answer
            os.kill(os.getpid(), signal.SIGKILL)

    return FakeCandidate("killed", before)


def exits(job: Job) -> Candidate:
    raise SystemExit("the library gave up")


class OtherSeed(RuntimeCandidate):
    def generate(self, prompt: str, seed: int) -> Generated:
        return super().generate(prompt, seed + 1)


def other_seed(job: Job) -> Candidate:
    """The real runtime with another seed than requested."""
    return OtherSeed(job, SanaRuntime.from_pretrained(job.bundle, backend="onnxruntime"))


class Slowed(RuntimeCandidate):
    """The real runtime with extra runs of the denoiser (`SLOWER`)."""

    def __init__(self, job: Job, runtime: SanaRuntime) -> None:
        super().__init__(job, runtime)
        denoiser, more = runtime.sessions["denoiser"], float(os.environ[SLOWER])

        class Session:
            owed = 0.0

            def run(self, feeds: Any) -> Any:
                self.owed += more
                while self.owed >= 1:
                    self.owed -= 1
                    denoiser.run(feeds)
                return denoiser.run(feeds)

        runtime.sessions["denoiser"] = Session()


def slowed(job: Job) -> Candidate:
    return Slowed(job, SanaRuntime.from_pretrained(job.bundle, backend="onnxruntime", threads=job.threads))
