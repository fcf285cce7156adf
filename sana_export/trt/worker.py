"""Builds one engine in a process of its own.

The builder gives up the GIL but runs for seconds to minutes without a call back, so a Ctrl-C in its own process would
wait for it, and a thread left behind crashes the exit. A child can be ended at any moment, cannot take its caller
down, and gives its memory back. The parent sends a job as one line of JSON and keeps the pipe open: when the parent
dies the pipe closes and the child ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sana_export.contract import GraphSpec
from sana_export.environment import peak_rss_bytes
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, error_from_json
from sana_export.files import partial_path
from sana_export.manifest import parse_spec
from sana_export.profiles import Range
from sana_export.trt.build import Built, Cancelled, build_engine
from sana_export.trt.options import BuildOptions
from sana_export.trt.progress import OnProgress, Progress

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
#: `Popen.returncode` of a child that was killed (SIGKILL, which Windows does not name).
_KILLED = -9


@dataclass(frozen=True)
class Job:
    """The arguments of `build_engine`, with the module by name."""

    module: str
    onnx: str
    destination: str
    spec: GraphSpec
    ranges: Mapping[str, Range]
    compute_capabilities: tuple[str, ...]
    options: BuildOptions
    timing_cache: str | None = None


def build_in_child(job: Job, *, on_progress: OnProgress | None = None, cancelled: Callable[[], bool] = lambda: False) -> Built:
    """`build_engine` in a child process; `on_progress` runs in the calling thread.

    Ctrl-C, an exception of `on_progress` or `cancelled()` ends the child at once and leaves no file. Raises what
    `build_engine` raises, and ArtifactError where the compiler itself crashes.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", "from sana_export.trt.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)},
        )
        try:
            return _follow(child, job, noise, on_progress, cancelled)
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # the pipe to a child that was killed
                    if pipe is not None:
                        pipe.close()
            with contextlib.suppress(OSError):  # there is nothing where the folder could not be made
                partial_path(Path(job.destination)).unlink()


def _follow(
    child: subprocess.Popen[str],
    job: Job,
    noise: IO[str],
    on_progress: OnProgress | None,
    cancelled: Callable[[], bool],
) -> Built:
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died at start: the missing answer below tells
        child.stdin.write(json.dumps([dataclasses.asdict(job), LOG.getEffectiveLevel()]) + "\n")
        child.stdin.flush()
    peak = 0
    for message in _messages(child.stdout, cancelled, job.spec.name):
        peak = max(peak, peak_rss_bytes(child.pid))
        if message is None:
            continue
        if "progress" in message and on_progress is not None:
            on_progress(Progress(**message["progress"]))
        if "log" in message:
            name, level, text = message["log"]
            logging.getLogger(name).log(level, "%s", text)
        if "error" in message:
            raise _error(message["error"])
        if "built" in message:
            return Built(**message["built"])
    if (code := child.wait()) == _KILLED:
        raise DependencyError(
            f"the system ended the build of {job.spec.name}: there is too little memory",
            found=f"killed (signal {-_KILLED}) with {peak} bytes in memory",
            wanted="a machine with more memory free",
            fix="close other programs, or go where there is more memory, and run the same command again: finished engines are kept",
        )
    noise.seek(0)
    raise ArtifactError(
        f"the compiler ended without an engine of {job.spec.name}",
        found=f"exit code {code}; {noise.read()[-500:].strip() or 'no output'}",
        wanted="an engine",
        fix="run it again with fewer graphs (--graphs) or a smaller profile; a second failure is the compiler's",
    )


def _messages(stream: IO[str], cancelled: Callable[[], bool], graph: str) -> Iterator[dict[str, Any] | None]:
    """The child's lines as they come, None while there is none. A thread reads them: the caller's stays open to Ctrl-C."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # the stream was closed by a caller that gave up
            for line in stream:
                lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        if cancelled():
            raise Cancelled(f"the build of {graph} was cancelled")
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        yield json.loads(line)


def _error(message: Mapping[str, Any]) -> Exception:
    if "traceback" in message:
        return RuntimeError(f"the build failed in its own process:\n{message['traceback']}")
    return error_from_json(message)


def main() -> None:
    """The child: read a job from stdin, build, answer on stdout in lines of JSON."""
    # Ctrl-C reaches the whole foreground group; the parent decides. Its end of the pipe closing means that it is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    document, log_level = json.loads(sys.stdin.readline())
    # Unbuffered: a thread that waits inside sys.stdin would hold its lock when the interpreter ends.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    lock = threading.Lock()

    def answer(**message: Any) -> None:
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    logging.basicConfig(level=log_level, handlers=[_Forward(answer)])
    try:
        built = _run(_job(document), answer)
        answer(built=dataclasses.asdict(dataclasses.replace(built, peak_bytes=peak_rss_bytes())))
    except SanaExportError as error:
        answer(error=error.as_json())
    except Exception:  # a bug of ours: the parent raises it with this traceback
        answer(error={"traceback": traceback.format_exc()})


def _run(job: Job, answer: Callable[..., None]) -> Built:
    return build_engine(
        importlib.import_module(job.module),
        Path(job.onnx),
        Path(job.destination),
        job.spec,
        job.ranges,
        compute_capabilities=job.compute_capabilities,
        options=job.options,
        timing_cache=None if job.timing_cache is None else Path(job.timing_cache),
        on_progress=lambda progress: answer(progress=dataclasses.asdict(progress)),
    )


def _job(document: Mapping[str, Any]) -> Job:
    return Job(
        **{
            **document,
            "spec": parse_spec(document["spec"]),
            "ranges": {axis: tuple(values) for axis, values in document["ranges"].items()},
            "compute_capabilities": tuple(document["compute_capabilities"]),
            "options": BuildOptions(**document["options"]),
        }
    )


class _Forward(logging.Handler):
    """Sends the child's log records to the parent."""

    def __init__(self, answer: Callable[..., None]) -> None:
        super().__init__()
        self.answer = answer

    def emit(self, record: logging.LogRecord) -> None:
        self.answer(log=(record.name, record.levelno, record.getMessage()))
