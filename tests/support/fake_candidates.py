"""Backends for tests, named as "tests.support.fake_candidates:function": without a model, and each wrong in its own way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from sana_export.bench.candidates.runtime import RuntimeCandidate
from sana_export.bench.candidates.table import Candidate, Job, Sample
from sana_export.errors import DependencyError
from sana_export.runtime.pipeline import SanaRuntime

#: The file that `notes_turns` writes its calls to.
LOG = "FAKE_BACKENDS_LOG"
#: How many times more the denoiser of `slowed` runs; 0.25: once more every fourth time.
SLOWER = "FAKE_BACKENDS_SLOWER"


class Fake:
    """Draws grey; `before` is run at the start of each call."""

    precision = "fp32"

    def __init__(self, name: str, before: Callable[[int], None] = lambda calls: None) -> None:
        self.description, self.before, self.calls = f"fake {name}", before, 0

    def generate(self, prompt: str, seed: int) -> Sample:
        self.before(self.calls)
        self.calls += 1
        image = Image.new("RGB", (8, 8), (seed, 0, 0))
        return Sample([image], {"denoise_step": [1.0, 2.0, 9.0], "denoise_loop": [12.0]})

    def peak_device_bytes(self) -> int | None:
        return None


def _note(name: str) -> Callable[[int], None]:
    def before(calls: int) -> None:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{name}{calls} ")

    return before


def notes_turns(job: Job) -> Candidate:
    return Fake("one", _note("a"))


def notes_turns_too(job: Job) -> Candidate:
    return Fake("two", _note("b"))


def cannot_load(job: Job) -> Candidate:
    raise FileNotFoundError("no weights for the fake")


def lacks_a_package(job: Job) -> Candidate:
    raise DependencyError("no such package")


def raises_later(job: Job) -> Candidate:
    def before(calls: int) -> None:
        if calls == 1:
            raise ValueError("the second call is too much")

    return Fake("raises", before)


def is_killed_later(job: Job) -> Candidate:
    def before(calls: int) -> None:
        if calls == 1:
            os.write(1, b"about to die\n")  # what a library prints must not be taken for an answer
            os.kill(os.getpid(), signal.SIGKILL)

    return Fake("killed", before)


def exits(job: Job) -> Candidate:
    raise SystemExit("the library gave up")


class OtherSeed(RuntimeCandidate):
    def generate(self, prompt: str, seed: int) -> Sample:
        return super().generate(prompt, seed + 1)


def other_seed(job: Job) -> Candidate:
    """The real runtime, with another seed than it was asked for."""
    return OtherSeed(job, SanaRuntime.from_pretrained(job.bundle, backend="onnxruntime"))


class Slowed(RuntimeCandidate):
    """The real runtime, whose denoiser runs as many times more as the environment says."""

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
