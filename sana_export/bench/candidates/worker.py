"""Runs one candidate in its own process, so that its memory, threads and crashes do not affect the others.

The two processes exchange lines of JSON: one answer for each request. The worker is idle between requests and ends when the pipe
is closed.
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
from sana_export.child_process import start_module
from sana_export.environment import peak_rss_bytes
from sana_export.errors import SanaExportError

log = logging.getLogger(__name__)

#: Number of lines of a dead worker's stderr that the reason repeats.
_LAST_LINES = 3


class WorkerFailed(Exception):
    """A worker died or could not answer a request. `str()` is the reason.

    `unfit`: the worker reported an error for users, for example a missing package.
    """

    def __init__(self, reason: str, *, unfit: bool = False) -> None:
        super().__init__(reason)
        self.unfit = unfit


class Worker:
    """A worker, seen from the parent. Use it as a context manager: leaving it ends the process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in `close`)
        self.process = start_module(
            "sana_export.bench.candidates.worker",
            environment=_environment(job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def prepare(self) -> None:
        """Do what is needed once before the candidate can be loaded."""
        self._ask({"prepare": self.job.as_json()})

    def load(self) -> dict[str, Any]:
        """Load the candidate. Returns description, precision, load_seconds, and the process's cpu_seconds so far."""
        return self._ask({"load": self.job.as_json()})

    def call(self, prompt: str, seed: int, images: Path) -> dict[str, Any]:
        """Make one call. Returns times (ms by stage), peak_rss_bytes, peak_device_bytes, and the process's cpu_seconds so far.

        The worker writes the images to the file `images`, uint8 [B, H, W, 3] as .npy.
        """
        return self._ask({"call": {"prompt": prompt, "seed": seed, "images": str(images)}})

    def rates(self, precision: str) -> Rates:
        """Measure the ceiling of the workload's device, for products in `precision`."""
        return Rates(**self._ask({"rates": {"job": self.job.as_json(), "precision": precision}}))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._stderr):
            with contextlib.suppress(OSError):  # the pipe to a child that was killed
                if pipe is not None:
                    pipe.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the missing answer below says so
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise WorkerFailed(self._exit_reason())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"], unfit=answer["unfit"])
        return answer

    def _exit_reason(self) -> str:
        """How the process ended, with the last lines of its stderr."""
        code = self.process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "; ".join([f"its process ended: {ended}", *lines[-_LAST_LINES:]])


def _environment(job: Job) -> dict[str, str]:
    """The job's number of threads, and no GPU for a workload on the CPU, for libraries that read environment variables."""
    settings = {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    if job.workload.device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""
    return settings


def main() -> None:
    """The child: answer each line of stdin until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    logging.basicConfig(level=logging.WARNING)
    server = WorkerServer()
    for line in sys.stdin:
        answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
        answers.flush()


class WorkerServer:
    """Answers requests: "prepare", "rates" and "load" with a job, then any number of "call"."""

    def __init__(self) -> None:
        self.candidate: Candidate | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request; {"failed": reason} if it failed."""
        ((kind, content),) = request.items()
        try:
            return {"prepare": self.prepare, "rates": self.rates, "load": self.load, "call": self.call}[kind](content)
        except SanaExportError as error:
            return {"failed": str(error), "unfit": True}
        except Exception as error:  # the report gives the reason; the other backends go on
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}", "unfit": False}

    def prepare(self, content: Mapping[str, Any]) -> dict[str, Any]:
        job = Job.from_json(content)
        if (target := find_row(job.backend).prepare) is not None:
            resolve(target)(job)
        return {}

    def rates(self, content: Mapping[str, Any]) -> dict[str, Any]:
        job = Job.from_json(content["job"])
        return dataclasses.asdict(measure_rates(job.workload.device, content["precision"], job.threads, index=job.device))

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
