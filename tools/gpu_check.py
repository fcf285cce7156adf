"""Prepares a virtual environment for `python -m sana_export.bench.gpu_check` and runs it there. `make gpu-check` calls this.

The environment sees every package of this interpreter, and only missing packages are installed into it. Installed packages are not
replaced, least of all PyTorch, which on a GPU machine often belongs to the system. With --wheels nothing is downloaded.

Run it as a module from the root of the source tree: `python -m tools.gpu_check --venv FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from sana_export.environment import release
from sana_export.gpu_support import is_datacenter, unsupported_reason
from sana_export.machine import gpu_compute_capability

ROOT = Path(__file__).resolve().parent.parent
#: Extras of pyproject.toml that every part of the check needs, and other packages. nvidia-ml-py reads the GPU's clocks and power.
EXTRAS, OTHERS = ("export",), ("nvidia-ml-py>=12", "pytest>=8", "safetensors")
#: The extras that bring ONNX Runtime with and without a GPU. Their packages provide one module.
ONNX_RUNTIMES = {True: "cuda", False: "cpu"}
#: Packages that are never replaced, however old: they belong to the machine's CUDA.
KEPT = ("torch",)
#: CUDA's libraries in the packages of NVIDIA, below a folder of packages.
LIBRARIES = ("nvidia/cu*/lib", "nvidia/*/lib")
#: Seconds for all installations together.
SETUP_SECONDS = 600
_VERSIONS = (
    "import json, sys; from importlib import metadata; print(json.dumps({(d.metadata['Name'] or '').lower().replace('_', '-'):"
    " d.version for d in reversed(list(metadata.distributions()))}))"
)


class Environment:
    """The virtual environment in `folder`. Packages come from the folder `wheels`, or from pip's index if that is None."""

    def __init__(self, folder: Path, wheels: Path | None) -> None:
        self.folder, self.wheels = folder, wheels
        #: What the report says about the environment.
        self.notes: list[str] = []
        self.deadline = time.monotonic() + SETUP_SECONDS
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        #: The compute capability of the GPU, or None.
        self.gpu = gpu_compute_capability()

    def make(self) -> None:
        """Create it if it does not exist. It sees all packages of this interpreter, even those of a virtual environment."""
        if self.python.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], check=True)
        own = Path(self._folder())
        seen = dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        (own / "seen-from-outside.pth").write_text("\n".join(path for path in seen if Path(path).is_dir()) + "\n", "utf-8")

    def versions(self) -> dict[str, str]:
        """Installed package (lower case, with hyphens) to version."""
        found: dict[str, str] = json.loads(subprocess.run([self.python, "-c", _VERSIONS], capture_output=True, check=True).stdout)
        return found

    def own_packages(self) -> set[str]:
        """The packages in its own folder, without those that it sees from outside."""
        return {(found.metadata["Name"] or "").lower().replace("_", "-") for found in metadata.distributions(path=[self._folder()])}

    def library_folders(self) -> list[str]:
        """The folders of CUDA's libraries in the packages that it sees from outside, if it has none of its own.

        ONNX Runtime only looks beside its own folder. With libraries there it needs no others, and PyTorch must not get those.
        """
        if list(Path(self._folder()).glob("nvidia")):
            return []
        paths = self._ask("import os, sys; print(os.pathsep.join(sys.path))").split(os.pathsep)
        found = (folder for path in paths if path for pattern in LIBRARIES for folder in sorted(Path(path).glob(pattern)))
        return list(dict.fromkeys(map(str, found)))

    def _folder(self) -> str:
        """The folder of its own packages."""
        return self._ask("import sysconfig; print(sysconfig.get_path('purelib'))")

    def _ask(self, code: str) -> str:
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def install(self, requirements: Iterable[str]) -> bool:
        """Install without changing the packages of `KEPT`, and return whether it worked. A failure becomes a note."""
        wanted = list(requirements)
        have = self.versions()
        with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as pins:
            pins.write("".join(f"{name}=={have[name]}\n" for name in KEPT if name in have))
        command = [*self._pip(), "install", "--quiet", "--no-input", "--retries", "1", "--timeout", "10", "-c", pins.name]
        command += ["--no-index", "--find-links", str(self.wheels)] if self.wheels else []
        try:
            left = max(self.deadline - time.monotonic(), 1.0)
            done = subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=left)
            said = (done.stderr or done.stdout).strip().splitlines()
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            said, failed = [f"out of time: all installations together may take {SETUP_SECONDS} s"], True
        finally:
            Path(pins.name).unlink()
        if failed:
            self.notes.append(f"could not install {', '.join(wanted)}: {(said or ['no reason given'])[-1]}")
        return not failed

    def _pip(self) -> list[str]:
        """The environment's pip, or else this interpreter's, directed at the environment."""
        own = subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True).returncode == 0
        return [str(self.python), "-m", "pip"] if own else [sys.executable, "-m", "pip", "--python", str(self.python)]


def missing(requirements: Iterable[str], have: dict[str, str]) -> list[str]:
    """Those of `requirements` ("name[extra]>=version") that are not met. Any version of a package of `KEPT` is enough."""
    found = []
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        version = have.get(name.partition("[")[0].lower().replace("_", "-"))
        if version is None or (name not in KEPT and least and release(version) < release(least)):
            found.append(requirement)
    return found


def required() -> list[str]:
    """Requirements of every part, from pyproject.toml."""
    project = read_project()
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(name for extra in EXTRAS for name in extras[extra]), *OTHERS]


def optional(gpu: str | None) -> list[str]:
    """Requirements of some parts: the packages that run engines on a GPU of this compute capability.

    Without a GPU, TensorRT-RTX: it builds engines on any machine. TensorRT is several gigabytes, so it is only for GPUs of
    datacenters, most of which TensorRT-RTX does not support.
    """
    names = [] if gpu and unsupported_reason("tensorrt-rtx", gpu) else ["tensorrt-rtx"]
    names += ["onnxruntime-tensorrt-rtx"] if gpu and not unsupported_reason("onnxruntime-tensorrt-rtx", gpu) else []
    names += ["tensorrt"] if gpu and is_datacenter(gpu) else []
    extras = read_project()["optional-dependencies"]
    return list(dict.fromkeys(requirement for name in names for requirement in extras[name]))


def missing_onnxruntime(environment: Environment) -> list[str]:
    """The requirement of ONNX Runtime that is not met, if there is one.

    With a GPU it is onnxruntime-gpu. It may be installed into an environment that only sees another's onnxruntime, because the
    environment's own packages are found first. In one folder the two would overwrite each other's files.
    """
    have, needs_gpu = environment.versions(), environment.gpu is not None
    (wanted,) = read_project()["optional-dependencies"][ONNX_RUNTIMES[needs_gpu]]
    if not missing([wanted], have) or (not needs_gpu and "onnxruntime-gpu" in have):
        return []
    if needs_gpu and "onnxruntime" in environment.own_packages():
        environment.notes.append(
            f"ONNX Runtime is not tested on the GPU: {environment.folder} has onnxruntime, which excludes onnxruntime-gpu"
        )
        return []
    return [wanted]


def read_project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def prepare(environment: Environment) -> dict[str, object]:
    """Install what is missing and return what was installed, for the report."""
    environment.make()
    before = environment.versions()
    lacking = missing(required(), before)
    # All together. If that fails, one by one: a missing package then skips only the parts that need it.
    if lacking and not environment.install(lacking):
        for requirement in lacking if len(lacking) > 1 else ():
            environment.install([requirement])
    for requirement in (*missing_onnxruntime(environment), *missing(optional(environment.gpu), environment.versions())):
        environment.install([requirement])
    after = environment.versions()
    new = {name: version for name, version in after.items() if before.get(name) != version}
    if new:
        listed = ", ".join(f"{name} {version}" for name, version in sorted(new.items()))
        environment.notes.append(f"installed for this run: {listed}")
    return {"installed": new, "notes": environment.notes}


def main() -> int:
    """Prepare the environment, run the check in it with the remaining options, and return its exit code."""
    started = time.time()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="folder of the environment; created if it does not exist")
    parser.add_argument("--wheels", type=Path, help="install only from this folder of wheels")
    options, rest = parser.parse_known_args()
    environment = Environment(options.venv.absolute(), options.wheels and options.wheels.absolute())
    if environment.wheels and not environment.wheels.is_dir():
        parser.error(f"there is no folder {environment.wheels}")
    setup = {**prepare(environment), "seconds": round(time.time() - started, 1)}
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(setup, file)
    command = [str(environment.python), "-m", "sana_export.bench.gpu_check", "--started", str(started), "--setup", file.name, *rest]
    try:
        return subprocess.run(command, env=_variables(environment), cwd=ROOT).returncode
    finally:
        Path(file.name).unlink()


def _variables(environment: Environment) -> dict[str, str]:
    libraries = [*filter(None, [os.environ.get("LD_LIBRARY_PATH")]), *environment.library_folders()]
    return {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": os.pathsep.join(libraries)}


if __name__ == "__main__":
    raise SystemExit(main())
