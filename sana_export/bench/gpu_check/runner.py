"""Runs the parts one after the other, each in a child process, until a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import FAILED, NOT_RUN, PASSED, SKIPPED
from sana_export.bench.gpu_check.parts import CheckPart
from sana_export.child_process import start_module
from sana_export.gpu_support import unsupported_reason

#: Number of lines of a part's output that the reason repeats.
_LAST_LINES = 4
#: Environment variables that turn off progress bars, which would fill the output.
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
#: Seconds before the deadline that no part may use.
RESERVE = 5.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part."""

    #: PASSED, FAILED, SKIPPED or NOT_RUN.
    status: str
    #: Why it did not pass, or None.
    reason: str | None = None
    #: Time that it took.
    seconds: float = 0.0
    #: What it found, also if it did not finish.
    found: Mapping[str, Any] = field(default_factory=dict)
    #: Path of the file with its output, in the work folder.
    log: str | None = None


@dataclass(frozen=True)
class Capabilities:
    """What this machine has, which decides which parts can run."""

    #: The GPU's compute capability ("8.9"). None if there is no GPU.
    compute_capability: str | None
    #: Those modules of the parts that work.
    modules: Collection[str]
    #: Module to the reason why it cannot use the GPU.
    without_gpu: Mapping[str, str] = field(default_factory=dict)


@dataclass
class PartRunner:
    """Runs parts and returns their outcomes."""

    #: Folder for intermediate files and logs.
    work: Path
    #: What this machine has.
    capabilities: Capabilities
    #: "cuda" or "cpu".
    device: str
    #: End of the run, as a value of `time.monotonic`.
    deadline: float
    #: Outcomes of an earlier run are kept only if it had the same key.
    key: str = ""
    #: Whether to keep outcomes of an earlier run.
    resume: bool = False

    def run(self, parts: Iterable[CheckPart], on_outcome: Callable[[CheckPart, Outcome], None]) -> dict[str, Outcome]:
        """The outcome of each part. `on_outcome` gets each as soon as it is known."""
        outcomes: dict[str, Outcome] = {}
        for part in parts:
            outcomes[part.name] = self._outcome(part)
            on_outcome(part, outcomes[part.name])
        return outcomes

    def _outcome(self, part: CheckPart) -> Outcome:
        if (reason := self._lacking(part)) is not None:
            return Outcome(SKIPPED, reason)
        if (earlier := self._earlier(part)) is not None:
            return earlier
        left = self.deadline - RESERVE - time.monotonic()
        if left < part.least:
            return Outcome(NOT_RUN, f"out of time: {max(left, 0.0):.0f} s left, but it needs at least {part.least:.0f} s")
        outcome = self._child(part, min(part.most, left), cut_short=left < part.most)
        if outcome.status in (PASSED, FAILED):
            self._file(part, "outcome").write_text(json.dumps({"key": self.key, **asdict(outcome)}), "utf-8")
        return outcome

    def _lacking(self, part: CheckPart) -> str | None:
        """Why the part cannot run on this machine, or None."""
        capability = self.capabilities.compute_capability
        if part.gpu and capability is None and self.device == "cuda":
            return "no GPU"
        if part.backend is not None and capability is not None and (reason := unsupported_reason(part.backend, capability)):
            return reason
        if missing := [name for name in part.modules if name not in self.capabilities.modules]:
            return f"not installed: {', '.join(missing)}"
        if part.one_of and not any(name in self.capabilities.modules for name in part.one_of):
            return f"none of these is installed: {', '.join(part.one_of)}"
        reasons = [self.capabilities.without_gpu[name] for name in part.on_gpu if name in self.capabilities.without_gpu]
        return "; ".join(reasons) if reasons and self.device == "cuda" else None

    def _earlier(self, part: CheckPart) -> Outcome | None:
        """The outcome of an earlier run with the same key, if `resume` is set and there is one."""
        if not self.resume:
            return None
        try:
            document = json.loads(self._file(part, "outcome").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return Outcome(**document) if document.pop("key", None) == self.key else None

    def _child(self, part: CheckPart, limit: float, cut_short: bool) -> Outcome:
        request, answer, log = (self._file(part, kind) for kind in ("request", "answer", "log"))
        answer.unlink(missing_ok=True)
        asked = {"target": part.target, "arguments": dict(part.arguments), "work": str(self.work), "device": self.device}
        request.write_text(json.dumps(asked), "utf-8")
        started = time.monotonic()
        with log.open("wb") as output:
            process = start_module(
                "sana_export.bench.gpu_check.child",
                str(request),
                str(answer),
                environment=_QUIET,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        seconds = round(time.monotonic() - started, 2)
        outcome = replace(_read(answer, code, limit, seconds, log), log=log.relative_to(self.work).as_posix())
        if code is None and cut_short and outcome.status == FAILED:
            reason = f"out of time: ended after {limit:.0f} s, but it may take {part.most:.0f} s"
            return replace(outcome, status=NOT_RUN, reason=reason)
        return outcome

    def _file(self, part: CheckPart, kind: str) -> Path:
        folder = self.work / "parts"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "log" if kind == "log" else f"{kind}.json"
        return folder / f"{part.name.replace('/', '-')}.{suffix}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child and all processes of its session."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # all have ended already
            os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows has no groups of processes
        process.kill()
    process.wait()


def _read(answer: Path, code: int | None, limit: float, seconds: float, log: Path) -> Outcome:
    """The outcome that the child wrote to `answer`; a failure if there is none. `code` None: the child was ended at its limit."""
    try:
        document = json.loads(answer.read_text("utf-8"))
    except (OSError, ValueError):
        document = {}
    found, status = document.get("found", {}), document.get("status")
    if status is not None:
        return Outcome(status, document.get("reason"), seconds, found)
    if code is None:
        ended = f"ended because it was still running after its {limit:.0f} s"
    elif code < 0:
        ended = f"its process was killed by {signal.Signals(-code).name}"
    else:
        ended = f"its process ended with exit code {code} and no answer"
    return Outcome(FAILED, "; ".join([ended, *_last_lines(log)]), seconds, found)


def _last_lines(log: Path) -> list[str]:
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-_LAST_LINES:]
