"""A server in a process of its own, as a user starts it, on a free port of loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx
import psutil

#: Seconds in which a server has to be ready.
START_SECONDS = 120.0
MODULE = "sana_export"


class ServerProcess:
    """`sana-export serve BUNDLE`, ready when the block begins and ended with its block."""

    def __init__(self, bundle: Path, *options: object, module: str = MODULE, environment: dict[str, str] | None = None) -> None:
        """`module`: what runs the command line, for stand-ins. `environment`: variables beside those of this process."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        words = ("serve", bundle, "--port", self.port, *options)
        self.command = [sys.executable, "-m", module, *map(str, words)]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}

    def __enter__(self) -> ServerProcess:
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.meter = psutil.Process(self.process.pid)
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.append(line)

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Raises RuntimeError with the log if the server ends or is not ready in time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready after {seconds:g} seconds:\n{self.log()}")

    def stop(self, seconds: float = 30.0) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def log(self) -> str:
        """What the server has written so far."""
        return "".join(self._lines)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def waited_seconds(pid: int, thread: int | None = None) -> float:
    """How long a thread was ready but other programs had the processors, so far, as Linux counts it. 0 on other systems.

    Without `thread`, that of the process which has computed the most: in a server, the one that draws.
    """
    tasks = Path(f"/proc/{pid}/task")
    found: list[tuple[int, int]] = []
    for task in tasks.glob("*" if thread is None else str(thread)):
        with suppress(OSError):  # it has ended
            computed, waited, _ = map(int, (task / "schedstat").read_text().split())
            found.append((computed, waited))
    return max(found, default=(0, 0))[1] / 1e9


def resident_mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


def words_of(text: str) -> Sequence[str]:
    """The options in one argument, as a shell splits them."""
    import shlex

    return shlex.split(text)
