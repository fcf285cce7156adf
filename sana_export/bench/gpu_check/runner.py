"""Runs parts one after the other, each in a child process, within one deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import FAILED, NOT_RUN, PASSED, SKIPPED
from sana_export.bench.gpu_check.parts import Part

#: Lines of a part's output that its reason repeats.
_LAST_LINES = 4
#: Progress bars are no words to repeat.
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
#: Seconds at the end that no part gets.
RESERVE = 5.0


@dataclass(frozen=True)
class Outcome:
    """What came of a part. `found`: what it answered, as far as it came; `reason`: why it did not pass. `log`: its output."""

    status: str
    reason: str | None = None
    seconds: float = 0.0
    found: Mapping[str, Any] = field(default_factory=dict)
    log: str | None = None


@dataclass(frozen=True)
class Here:
    """What decides which parts can run. `modules`: of those that parts ask for, the ones that are installed."""

    gpu: bool
    modules: Collection[str]
    cuda_provider: bool


@dataclass
class Runner:
    """`deadline`: of `time.monotonic`. `key`: what answers of an earlier run have to agree in to be taken again."""

    work: Path
    here: Here
    device: str
    deadline: float
    key: str = ""
    resume: bool = False

    def run(self, parts: Iterable[Part], on_outcome: Callable[[Part, Outcome], None]) -> dict[str, Outcome]:
        """The outcome of every part, each told to `on_outcome` as soon as it is known."""
        outcomes: dict[str, Outcome] = {}
        for part in parts:
            outcomes[part.name] = self._outcome(part)
            on_outcome(part, outcomes[part.name])
        return outcomes

    def _outcome(self, part: Part) -> Outcome:
        if (reason := self._lacking(part)) is not None:
            return Outcome(SKIPPED, reason)
        if (earlier := self._earlier(part)) is not None:
            return earlier
        left = self.deadline - RESERVE - time.monotonic()
        if left < part.least:
            return Outcome(NOT_RUN, f"out of time: {max(left, 0.0):.0f} s left, it needs at least {part.least:.0f} s")
        outcome = self._child(part, min(part.most, left), cut_short=left < part.most)
        if outcome.status in (PASSED, FAILED):
            self._file(part, "outcome").write_text(json.dumps({"key": self.key, **asdict(outcome)}), "utf-8")
        return outcome

    def _lacking(self, part: Part) -> str | None:
        """Why the part cannot run here; None where it can."""
        if part.gpu and not self.here.gpu and self.device == "cuda":
            return "no GPU"
        if missing := [name for name in part.modules if name not in self.here.modules]:
            return f"not installed: {', '.join(missing)}"
        if part.one_of and not any(name in self.here.modules for name in part.one_of):
            return f"none of these is installed: {', '.join(part.one_of)}"
        if part.cuda_provider and self.device == "cuda" and not self.here.cuda_provider:
            return "this ONNX Runtime has no CUDAExecutionProvider (onnxruntime-gpu has)"
        return None

    def _earlier(self, part: Part) -> Outcome | None:
        """What an earlier run with the same key found, where it is to be taken again."""
        if not self.resume:
            return None
        try:
            document = json.loads(self._file(part, "outcome").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return Outcome(**document) if document.pop("key", None) == self.key else None

    def _child(self, part: Part, limit: float, cut_short: bool) -> Outcome:
        request, answer, log = (self._file(part, kind) for kind in ("request", "answer", "log"))
        answer.unlink(missing_ok=True)
        asked = {"target": part.target, "arguments": dict(part.arguments), "work": str(self.work), "device": self.device}
        request.write_text(json.dumps(asked), "utf-8")
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        command = [sys.executable, "-P", "-m", "sana_export.bench.gpu_check.child", str(request), str(answer)]
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, **_QUIET},
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        seconds = round(time.monotonic() - started, 2)
        outcome = _read(answer, code, limit, seconds, log)
        if code is None and cut_short and outcome.status == FAILED:
            reason = f"out of time: ended after {limit:.0f} s, it may take {part.most:.0f} s"
            return Outcome(NOT_RUN, reason, seconds, outcome.found, log.name)
        return outcome

    def _file(self, part: Part, kind: str) -> Path:
        folder = self.work / "parts"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "log" if kind == "log" else f"{kind}.json"
        return folder / f"{part.name.replace('/', '-')}.{suffix}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started; its session is its own."""
    with contextlib.suppress(ProcessLookupError):  # all have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(answer: Path, code: int | None, limit: float, seconds: float, log: Path) -> Outcome:
    try:
        document = json.loads(answer.read_text("utf-8"))
    except (OSError, ValueError):
        document = {}
    found, status = document.get("found", {}), document.get("status")
    if status is not None:
        return Outcome(status, document.get("reason"), seconds, found, log.name)
    if code is None:
        ended = f"still running after its {limit:.0f} s, and ended"
    elif code < 0:
        ended = f"its process was killed by {signal.Signals(-code).name}"
    else:
        ended = f"its process ended with exit code {code} and no answer"
    return Outcome(FAILED, "; ".join([ended, *_last_lines(log)]), seconds, found, log.name)


def _last_lines(log: Path) -> list[str]:
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-_LAST_LINES:]
