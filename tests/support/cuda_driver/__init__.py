"""A stand-in for the CUDA driver library, so that the real cuda-core runs without a GPU.

The C files here are written from NVIDIA's public header cuda.h and the documentation of the CUDA Driver API. They make a library
`libcuda.so.1` with what `CudaDevice` needs: memory and its pool, copies, streams, events, captures and graphs. No kernel runs: in
their place, tests enqueue host functions (`device.py`).

It is stricter than a driver, to find mistakes:

* The host cannot read or write device memory. Fresh memory is full of rubbish.
* Work runs when somebody waits for it, so a missing wait shows. An event that was just recorded is not reached yet.
* Copies are checked against the live allocations when they are enqueued and when they run. Memory of the host must be pinned.
* What is forbidden during a capture breaks it. Freeing memory on a captured stream is forbidden, as documented.

It offers no private tables, by which NVIDIA's CUDA runtime makes sure that the driver is NVIDIA's. So nothing that contains that
runtime (TensorRT, TensorRT-RTX, PyTorch) runs on it, and it must stay so.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
ROOT = SOURCES.parents[2]
#: `-fvisibility=hidden` leaves the API and the functions of report.c visible.
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1")


def compiler() -> str | None:
    """The system's C compiler."""
    return shutil.which(os.environ.get("CC", "cc"))


def headers() -> Path | None:
    """The folder with cuda.h, from the wheel nvidia-cuda-runtime."""
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).parent for file in files if file.name == "cuda.h"), None)


def why_not() -> str | None:
    """Why the stand-in cannot be used here. None if it can."""
    if sys.platform != "linux":
        return "the stand-in for the CUDA driver is for Linux"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "cuda-core is not installed"
    if compiler() is None:
        return "no C compiler, to build the stand-in for the CUDA driver"
    if headers() is None:
        return "no cuda.h, to build the stand-in for the CUDA driver: pip install nvidia-cuda-runtime"
    return None


def build(cache: Path) -> Path:
    """The folder with the library, which is built once for each state of the sources."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    include = headers()
    assert include is not None
    digest = hashlib.sha256()
    for content in (str(FLAGS).encode(), (include / "cuda.h").read_bytes(), *(path.read_bytes() for path in sources)):
        digest.update(content)
    folder = cache / f"cuda-driver-{digest.hexdigest()[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            library = Path(partial) / "built" / "libcuda.so.1"
            library.parent.mkdir()
            files = [str(path) for path in sources if path.suffix == ".c"]
            command = [str(compiler()), *FLAGS, f"-I{include}", "-o", str(library), *files, "-lpthread", "-ldl"]
            compiled = subprocess.run(command, capture_output=True, text=True, check=False)
            assert compiled.returncode == 0, compiled.stderr
            try:
                library.parent.rename(folder)
            except OSError:  # another test process was faster
                assert folder.exists()
    return folder


def run(library: Path, arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in a child process that finds the stand-in in the folder `library`, with more environment variables.

    The library must be found before cuda-core is imported, and it would stay for all tests of a process.
    """
    search = os.pathsep.join(filter(None, (str(library), os.environ.get("LD_LIBRARY_PATH"))))
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment: Mapping[str, str] = {**os.environ, "LD_LIBRARY_PATH": search, "PYTHONPATH": python_path, **variables}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def run_tests(library: Path, arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with `arguments` on the stand-in."""
    plugin = ("-p", "tests.support.cuda_driver.plugin")
    none_else = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # to load schemathesis takes longer than most of these tests
    return run(library, ["-m", "pytest", *plugin, "-rfE", "--tb=short", *arguments], **none_else, **variables)
