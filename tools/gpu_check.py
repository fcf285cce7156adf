"""Prepares a Python environment for `python -m sana_export.bench.gpu_check` and runs it there. `make gpu-check` calls this.

Only what is missing is installed, into a virtual environment that sees all that this interpreter sees. What is there is not
replaced: PyTorch least of all, which on a GPU machine is often the system's. With --wheels nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Extras of pyproject.toml that every part needs, and packages beside them.
EXTRAS, BESIDE = ("export",), ("pytest>=8", "safetensors")
#: One of these is enough; the first that can be installed is taken. They must not be installed together.
ONNX_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
#: An extra whose packages are tried each on its own, and left out where they cannot be installed.
OPTIONAL = "tensorrt-rtx"
#: Never installed in place of an older one that is there: it belongs to the machine's CUDA.
KEPT = ("torch",)
#: Seconds for all that is installed.
SETUP_SECONDS = 150
_VERSIONS = (
    "import json, sys; from importlib import metadata; print(json.dumps({(d.metadata['Name'] or '').lower().replace('_', '-'):"
    " d.version for d in reversed(list(metadata.distributions()))}))"
)


class Environment:
    """The virtual environment in `folder`. `notes`: what the report should say of it."""

    def __init__(self, folder: Path, wheels: Path | None) -> None:
        self.folder, self.wheels, self.notes = folder, wheels, list[str]()
        self.deadline = time.monotonic() + SETUP_SECONDS
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def make(self) -> None:
        """Make it where it is not there. It sees all packages of the interpreter that runs this, a virtual environment's too."""
        if self.python.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], check=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = Path(subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
        seen = dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        (own / "seen-from-outside.pth").write_text("\n".join(path for path in seen if Path(path).is_dir()) + "\n", "utf-8")

    def versions(self) -> dict[str, str]:
        """Package (lower case, with hyphens) to version."""
        found: dict[str, str] = json.loads(subprocess.run([self.python, "-c", _VERSIONS], capture_output=True, check=True).stdout)
        return found

    def install(self, requirements: Iterable[str]) -> bool:
        """Install, keeping the packages of `KEPT` as they are. A failure becomes a note."""
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
            said, failed = [f"out of time: installing may take {SETUP_SECONDS} s in all"], True
        finally:
            Path(pins.name).unlink()
        if failed:
            self.notes.append(f"could not install {', '.join(wanted)}: {(said or ['no reason given'])[-1]}")
        return not failed

    def _pip(self) -> list[str]:
        """pip of the environment, or this interpreter's, told to work for the environment."""
        own = subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True).returncode == 0
        return [str(self.python), "-m", "pip"] if own else [sys.executable, "-m", "pip", "--python", str(self.python)]


def missing(requirements: Iterable[str], have: dict[str, str]) -> list[str]:
    """Those of `requirements` ("name" or "name>=version") that are not met; a package of `KEPT` counts as met in any version."""
    found = []
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        version = have.get(name.lower().replace("_", "-"))
        if version is None or (name not in KEPT and least and numbers(version) < numbers(least)):
            found.append(requirement)
    return found


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version: "2.11.0+cu130" to (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def required() -> list[str]:
    """What every part needs, from pyproject.toml."""
    project = read_project()
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(name for extra in EXTRAS for name in extras[extra]), *BESIDE]


def optional() -> list[str]:
    """What some parts need."""
    found: list[str] = read_project()["optional-dependencies"][OPTIONAL]
    return found


def read_project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def prepare(environment: Environment) -> dict[str, object]:
    """Install what is missing and say what came of it."""
    environment.make()
    before = environment.versions()
    lacking = missing(required(), before)
    # Together, or one by one where one of them cannot be had: parts are left out for what they lack, not all for one.
    if lacking and not environment.install(lacking):
        for requirement in lacking if len(lacking) > 1 else ():
            environment.install([requirement])
    if not any(name in environment.versions() for name in ONNX_RUNTIMES):
        any(environment.install([name]) for name in ONNX_RUNTIMES)
    for requirement in missing(optional(), environment.versions()):
        environment.install([requirement])
    after = environment.versions()
    new = {name: version for name, version in after.items() if before.get(name) != version}
    if new:
        listed = ", ".join(f"{name} {version}" for name, version in sorted(new.items()))
        environment.notes.append(f"installed for this run: {listed}")
    return {"installed": new, "notes": environment.notes}


def main() -> int:
    """Prepare, then run the check with the options that are left, and end with its exit code."""
    started = time.time()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="the environment: taken as it is, or made")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, to install from it alone")
    options, rest = parser.parse_known_args()
    environment = Environment(options.venv.absolute(), options.wheels and options.wheels.absolute())
    if environment.wheels and not environment.wheels.is_dir():
        parser.error(f"there is no folder {environment.wheels}")
    setup = {**prepare(environment), "seconds": round(time.time() - started, 1)}
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(setup, file)
    command = [str(environment.python), "-m", "sana_export.bench.gpu_check", "--started", str(started), "--setup", file.name, *rest]
    try:
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT).returncode
    finally:
        Path(file.name).unlink()


if __name__ == "__main__":
    raise SystemExit(main())
