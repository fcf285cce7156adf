"""Runs command lines, given as JSON, in a process that lacks what Windows lacks: functions of `os`, modules, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess  # noqa: F401  (the standard library does not expect this)
import sys
import tempfile  # noqa: F401
import types

#: Attributes of `os` that Windows does not have.
FUNCTIONS = (
    *("statvfs", "fstatvfs", "getuid", "geteuid", "getgid", "getegid", "sched_getaffinity", "sysconf", "fork", "killpg", "setsid"),
    *("uname", "fchmod", "chown", "mkfifo", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "getpgid", "wait4", "getloadavg", "geteuid"),
)
MODULES = ("fcntl", "pwd", "grp", "resource", "termios")
SIGNALS = ("SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGUSR1")


def main(lines: list[list[str]]) -> int:
    # These libraries know that this is no Windows, and ask for its functions when they are imported.
    import numpy  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel  # noqa: F401
    from transformers import Gemma2Model  # noqa: F401

    for name in FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        if hasattr(signal, name):
            delattr(signal, name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    msvcrt = types.ModuleType("msvcrt")
    msvcrt.LK_NBLCK, msvcrt.locking = 2, lambda descriptor, mode, count: None  # type: ignore[attr-defined]
    sys.modules["msvcrt"] = msvcrt
    from sana_export.cli.main import main as run

    return next(filter(None, map(run, lines)), 0)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
