"""Parts that pass, miss a limit, lack something, crash or hang, to test the runner with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.errors import DependencyError


def passes(context: PartContext, *, value: int = 1) -> dict[str, Any]:
    print("a line of output")  # noqa: T201
    with (context.work / "ran").open("a") as log:
        log.write(f"{value}\n")
    return {"value": value, "device": context.device}


def tells(context: PartContext) -> dict[str, Any]:
    """Where it works, which is not for others."""
    raise ValueError(f"{context.work}/x is wrong")


def misses(context: PartContext) -> dict[str, Any]:
    context.keep({"cosine": 0.5})
    raise CheckFailed("cosine 0.5 (limit 0.99)")


def lacks(context: PartContext) -> dict[str, Any]:
    raise DependencyError("the library is not here", fix="install it")


def raises(context: PartContext) -> dict[str, Any]:
    raise ValueError("a bug")


def crashes(context: PartContext) -> dict[str, Any]:
    context.keep({"half": "done"})
    sys.stderr.write("the last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(30)
    return {}


def hangs(context: PartContext) -> dict[str, Any]:
    """Starts another process, which must end with it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    context.keep({"child": child.pid})
    Path(context.work / "child").write_text(str(child.pid))
    time.sleep(60)
    return {}


def leaves_loudly(context: PartContext) -> dict[str, Any]:
    """Aborts at exit, which must not change the answer."""
    import atexit

    atexit.register(os.abort)
    return {"done": True}


def ends(context: PartContext) -> dict[str, Any]:
    os._exit(7)
