"""Builds of the small bundles and their results."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from sana_export.manifest import Manifest
from sana_export.profiles import PROFILES
from sana_export.trt.bundle import build_bundle, plan_bundle

DEFAULT = PROFILES["default"]


def build(bundle: Path, **options: Any) -> Manifest:
    return build_bundle(bundle, **{"backend": "tensorrt-rtx", "profile": DEFAULT, **options})


def paths(bundle: Path) -> dict[str, str]:
    """The path of each graph's engine in a default build."""
    engines = plan_bundle(bundle, backend="tensorrt-rtx", profile=DEFAULT)
    return {engine.spec.graph: engine.spec.path for engine in engines}


def tree(bundle: Path) -> dict[str, bytes]:
    """Every file of the bundle except locks, with its content."""
    files = (path for path in bundle.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}


def built_graphs(into: list[str]) -> Any:
    """An `on_engine` that appends the name of each built graph to `into`."""
    return lambda planned, entry: into.append(planned.spec.graph) if entry is not None else None


INTERRUPTED = """
import sys
from pathlib import Path
from sana_export.profiles import PROFILES
from sana_export.trt.bundle import build_bundle
seen = 0
def report(progress):
    global seen
    seen += 1
    print(progress.doing, flush=True)
try:
    build_bundle(Path(sys.argv[1]), backend="tensorrt-rtx", profile=PROFILES["default"], on_progress=report)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_slow_build(bundle: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that builds `bundle` and has reached the compiler's long phase without callbacks, and its child that compiles."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if ": Determining" in line:
            break
    time.sleep(0.3)
    assert process.poll() is None
    return process, psutil.Process(process.pid).children()[0]
