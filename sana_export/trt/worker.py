"""Builds one engine in a child process.

The builder releases the GIL but runs for seconds to minutes without a callback. In the caller's own process Ctrl-C would have to
wait for it, and a thread that still builds would crash the interpreter at exit. A child can be ended at any time, cannot crash its
caller, and frees its memory when it ends. The parent sends a job as one line of JSON and keeps the pipe open. When the parent dies,
the pipe closes and the child ends.
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

from sana_export.child_process import start_module
from sana_export.contract import GraphSpec
from sana_export.environment import peak_rss_bytes
from sana_export.errors import ArtifactError, Cancelled, DependencyError, SanaExportError, error_from_json
from sana_export.files import partial_path
from sana_export.manifest import parse_spec
from sana_export.profiles import Range
from sana_export.progress import OnProgress, Progress
from sana_export.trt.build import Built, build_engine
from sana_export.trt.options import BuildOptions

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
#: `Popen.returncode` of a child that was killed (SIGKILL, which Windows does not have).
_KILLED = -9
#: Characters of the child's stderr that an error shows.
_SHOWN_OUTPUT = 500


@dataclass(frozen=True)
class EngineJob:
    """The arguments of `build_engine`."""

    #: The name of the Python module, `tensorrt` or `tensorrt_rtx`.
    module: str
    #: The ONNX file.
    onnx: str
    #: The engine's file.
    destination: str
    #: The graph's inputs and outputs.
    spec: GraphSpec
    #: min, opt and max of every dynamic axis.
    ranges: Mapping[str, Range]
    #: The GPUs to build for ("8.9"). Empty: a portable engine, or one for this GPU.
    compute_capabilities: tuple[str, ...]
    #: The other options.
    options: BuildOptions
    #: The timing cache's file.
    timing_cache: str | None = None
    #: The command that exports the bundle again.
    export: str | None = None
    #: The result has the list of the engine's layers.
    list_layers: bool = False


def build_in_child(
    job: EngineJob, *, on_progress: OnProgress | None = None, cancelled: Callable[[], bool] = lambda: False
) -> Built:
    """`build_engine` in a child process. `on_progress` runs in the calling thread.

    Ctrl-C, an exception of `on_progress` or `cancelled()` ends the child at once and leaves no file. Raises what `build_engine`
    raises, ArtifactError if the compiler crashes, and DependencyError if the system kills it because memory ran out.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        child = start_module(
            "sana_export.trt.worker", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8"
        )
        try:
            return _follow(child, job, stderr, on_progress, cancelled)
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # the pipe to a child that was killed
                    if pipe is not None:
                        pipe.close()
            with contextlib.suppress(OSError):  # usually there is none
                partial_path(Path(job.destination)).unlink()


def _follow(
    child: subprocess.Popen[str],
    job: EngineJob,
    stderr: IO[str],
    on_progress: OnProgress | None,
    cancelled: Callable[[], bool],
) -> Built:
    """Send the job, handle the child's messages and return its result."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(OSError):  # it died at start: `_exit_error` reports that
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
    stderr.seek(0)
    raise _exit_error(job.spec.name, child.wait(), peak, stderr.read())


def _exit_error(graph: str, code: int, peak: int, output: str) -> SanaExportError:
    """The error for a child that ended without an answer: its exit code, peak memory in bytes and stderr."""
    if code == _KILLED:
        return DependencyError(
            f"the system killed the build of {graph}: there is too little memory",
            found=f"killed (signal {-_KILLED}) with {peak} bytes in memory",
            wanted="more free memory",
            fix="close other programs or use a machine with more memory, and run the same command again: finished engines are kept",
        )
    return ArtifactError(
        f"the compiler ended without an engine of {graph}",
        found=f"exit code {code}; {output[-_SHOWN_OUTPUT:].strip() or 'no output'}",
        wanted="an engine",
        fix="run it again with fewer graphs (--graphs) or a smaller profile; if it fails again, the cause is in the compiler",
    )


def _messages(stream: IO[str], cancelled: Callable[[], bool], graph: str) -> Iterator[dict[str, Any] | None]:
    """The child's messages as they come, and None while there is none. A thread reads them, so that Ctrl-C reaches the caller."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # the caller gave up and closed the stream
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
    """The child: read a job from stdin, build it, and write messages to stdout as lines of JSON."""
    # The terminal sends Ctrl-C to the child too, but the parent decides. If the parent is gone, its end of the pipe is closed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    document, log_level = json.loads(sys.stdin.readline())
    # os.read, because a thread that waits in sys.stdin would hold its lock when the interpreter ends.
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
    except Exception:  # a bug: the parent raises it with this traceback
        answer(error={"traceback": traceback.format_exc()})


def _run(job: EngineJob, answer: Callable[..., None]) -> Built:
    return build_engine(
        importlib.import_module(job.module),
        Path(job.onnx),
        Path(job.destination),
        job.spec,
        job.ranges,
        compute_capabilities=job.compute_capabilities,
        options=job.options,
        timing_cache=None if job.timing_cache is None else Path(job.timing_cache),
        export=job.export,
        list_layers=job.list_layers,
        on_progress=lambda progress: answer(progress=dataclasses.asdict(progress)),
    )


def _job(document: Mapping[str, Any]) -> EngineJob:
    return EngineJob(
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
        self._answer = answer

    def emit(self, record: logging.LogRecord) -> None:
        self._answer(log=(record.name, record.levelno, record.getMessage()))


if __name__ == "__main__":
    main()
