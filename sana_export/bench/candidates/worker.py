"""One candidate in a process of its own, so that memory, threads and crashes are its own; it is idle until it is asked.

Both sides speak lines of JSON. The parent sends a job, then one request for each call; the worker answers each line with one line.
Closing the pipe ends the worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from sana_export.bench.candidates.table import Candidate, Job, find_row, resolve
from sana_export.bench.nvtx_ranges import nvtx_range
from sana_export.bench.stages import END_TO_END
from sana_export.bench.work.ceiling import measure_rates
from sana_export.bench.work.count import Rates
from sana_export.environment import peak_rss_bytes
from sana_export.errors import SanaExportError

log = logging.getLogger(__name__)

#: Lines of a dead worker's last words that a report repeats.
_LAST_LINES = 3


class WorkerFailed(Exception):
    """A worker died or could not do what it was asked; `str()` is the reason.

    `unfit`: it told so itself, in an error for users: something that it needs is not here.
    """

    def __init__(self, reason: str, *, unfit: bool = False) -> None:
        super().__init__(reason)
        self.unfit = unfit


class Worker:
    """The parent's end of one worker. Use it as a context manager: leaving it ends the process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sana_export.bench.candidates.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            encoding="utf-8",
            env=_environment(job),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def prepare(self) -> None:
        """Do what has to be done once before the candidate can be loaded."""
        self._ask({"prepare": self.job.as_json()})

    def load(self) -> dict[str, Any]:
        """Load the candidate: description, precision, load_seconds, cpu_seconds of the process until now."""
        return self._ask({"load": self.job.as_json()})

    def call(self, prompt: str, seed: int, images: Path) -> dict[str, Any]:
        """One call: times (ms by stage), peak_rss_bytes, peak_device_bytes, cpu_seconds of the process until now.

        The file `images` gets its images, uint8 [B, H, W, 3] as .npy.
        """
        return self._ask({"call": {"prompt": prompt, "seed": seed, "images": str(images)}})

    def rates(self, precision: str) -> Rates:
        """The ceiling of the device that the workload runs on, for products in `precision`."""
        return Rates(**self._ask({"rates": {"job": self.job.as_json(), "precision": precision}}))

    @property
    def process(self) -> int:
        """The id of its process."""
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._noise):
            with contextlib.suppress(OSError):  # the pipe to a child that was killed
                if pipe is not None:
                    pipe.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the missing answer below tells
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"], unfit=answer["unfit"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._noise.seek(0)
        lines = [line.strip() for line in self._noise.read().splitlines() if line.strip()]
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "; ".join([f"its process ended: {ended}", *lines[-_LAST_LINES:]])


def _environment(job: Job) -> dict[str, str]:
    """The parent's environment, with the job's number of threads and its device for every library that asks there."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    if job.workload.device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **settings}


def main() -> None:
    """The child: answer each line of stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground group; the parent decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    logging.basicConfig(level=logging.WARNING)
    desk = Desk()
    for line in sys.stdin:
        answers.write(json.dumps(desk.answer(json.loads(line))) + "\n")
        answers.flush()


class Desk:
    """Answers requests: "prepare", "rates" and "load" with a job, then "call" as often as wanted."""

    def __init__(self) -> None:
        self.candidate: Candidate | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request; {"failed": reason} where it could not be done."""
        ((kind, content),) = request.items()
        try:
            return {"prepare": self.prepare, "rates": self.rates, "load": self.load, "call": self.call}[kind](content)
        except SanaExportError as error:
            return {"failed": str(error), "unfit": True}
        except Exception as error:  # whatever a backend raises is the report's reason, and must not end the others' run
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}", "unfit": False}

    def prepare(self, content: Mapping[str, Any]) -> dict[str, Any]:
        job = Job.from_json(content)
        if (target := find_row(job.backend).prepare) is not None:
            resolve(target)(job)
        return {}

    def rates(self, content: Mapping[str, Any]) -> dict[str, Any]:
        job = Job.from_json(content["job"])
        return dataclasses.asdict(measure_rates(job.workload.device, content["precision"], job.threads))

    def load(self, content: Mapping[str, Any]) -> dict[str, Any]:
        job, started = Job.from_json(content), perf_counter()
        self.candidate = resolve(find_row(job.backend).load)(job)
        return {
            "description": self.candidate.description,
            "precision": self.candidate.precision,
            "load_seconds": perf_counter() - started,
            "cpu_seconds": process_time(),
        }

    def call(self, content: Mapping[str, Any]) -> dict[str, Any]:
        assert self.candidate is not None
        with nvtx_range(self.candidate.description):
            started = perf_counter()
            sample = self.candidate.generate(content["prompt"], content["seed"])
            ended = perf_counter()
        peak = peak_rss_bytes()  # before the lines below add to it
        np.save(content["images"], np.stack([np.asarray(image) for image in sample.images]))
        times = {**{stage: list(times) for stage, times in sample.times.items()}, END_TO_END: [1e3 * (ended - started)]}
        return {
            "times": times,
            "peak_rss_bytes": peak,
            "peak_device_bytes": self.candidate.peak_device_bytes(),
            "cpu_seconds": process_time(),
        }


if __name__ == "__main__":
    main()
