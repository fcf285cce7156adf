"""Runs command lines and keeps their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ran:
    """The result of a command line: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as one JSON document."""
        return json.loads(self.out)


Cli = Callable[..., Ran]


def command(*arguments: object) -> list[str]:
    """The arguments of a process that runs `sana-export ARGUMENTS...`."""
    return [sys.executable, "-m", "sana_export", *map(str, arguments)]


def run_until(marker: str, arguments: list[str], number: signal.Signals) -> Ran:
    """Run a command, send it the signal `number` when `marker` appears on stderr, and wait until it ends."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    lines = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if marker in line:
                os.killpg(process.pid, number)  # to the whole group, as a terminal does
                break
        out, err = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    return Ran(process.returncode, out, "".join(lines) + err)
