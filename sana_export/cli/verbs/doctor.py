"""`sana-export doctor`: shows what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export import __version__
from sana_export.cli.bundle_text import memory_document, memory_needs, memory_text
from sana_export.cli.packages import EXCLUSIVE, PURPOSES, Package, exclusive_conflict, packages
from sana_export.cli.probe import BackendProbe, probe_backend
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.text import plural, size, table
from sana_export.cli.verb import Answer, Verb, path_named
from sana_export.commands import engines_command, generate_command
from sana_export.cuda_errors import find_failure
from sana_export.environment import installed_version, operating_system
from sana_export.gpu_support import backends_for, unsupported_reason
from sana_export.installation import install_command
from sana_export.machine import Gpu, cpu_name, find_cuda_error, find_gpus, gpu_memory_bytes, memory_bytes, usable_cores
from sana_export.manifest import Manifest
from sana_export.runtime.backends.onnxruntime_provider import INSTALL
from sana_export.trt.flavour import FLAVOURS

#: What commands name if no bundle is given.
_BUNDLE = Path("BUNDLE")


@dataclass(frozen=True)
class Machine:
    """What this machine has. The fields are keys of the JSON document."""

    #: Version of Python.
    python: str
    #: Path of the interpreter.
    executable: str
    #: Name and version of the system.
    platform: str
    #: The platform that engines are bound to, for example "linux-x86_64".
    operating_system: str
    #: Name of the CPU.
    processor: str
    #: Logical cores that this process may use.
    cores: int
    #: Bytes of memory; 0 if unknown.
    memory_bytes: int
    #: The NVIDIA GPUs.
    gpus: tuple[Gpu, ...]
    #: The name of the error with which NVIDIA's driver says why there is no GPU. None if there is one, or no driver.
    cuda_error: str | None = None


@dataclass(frozen=True)
class Ability:
    """One thing that can or cannot be done on this machine."""

    #: What it is, for example "export".
    name: str
    #: Whether it can be done.
    possible: bool
    #: What is missing.
    reason: str | None = None
    #: The command that fixes it, or the alternative. If it is possible: the option that it needs, or None.
    fix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        type=path_named("BUNDLE"),
        metavar="BUNDLE",
        nargs="?",
        help="also show how much GPU memory the engines of this bundle need",
    )


def run(options: argparse.Namespace, console: Console) -> Answer:
    machine, found = this_machine(), packages()
    probes = [probe_backend(backend) for backend in FLAVOURS]
    abilities = list(judge(machine, found, probes, options.bundle or _BUNDLE))
    conflict = exclusive_conflict()
    document: dict[str, Any] = {
        "sana_export": __version__,
        "machine": dataclasses.asdict(machine),
        "packages": [{**dataclasses.asdict(package), "problem": package.problem} for package in found],
        "backends": [dataclasses.asdict(probe) for probe in probes],
        "abilities": {ability.name: dataclasses.asdict(ability) for ability in abilities},
        "warnings": [conflict] if conflict else [],
    }
    parts = [
        f"sana-export {__version__}",
        _machine_text(machine),
        _packages_text(found) if found else "packages: sana-export runs from its source folder and is not installed",
        table([(ability.name, _verdict(ability)) for ability in abilities]),
    ]
    if options.bundle is not None:
        bundle = options.bundle
        memory = memory_needs(bundle, Manifest.load(bundle))
        document["memory"] = memory_document(memory)
        parts.append(memory_text(memory, gpu_memory_bytes(machine.gpus)) or f"{bundle} has no engines")
    if conflict:
        parts.insert(0, f"warning: {conflict}")
    return Answer(document, "\n\n".join(parts))


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        operating_system=operating_system(),
        processor=cpu_name(),
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        gpus=find_gpus(),
        cuda_error=find_cuda_error(),
    )


def judge(machine: Machine, found: list[Package], probes: Iterable[BackendProbe], bundle: Path = _BUNDLE) -> Iterable[Ability]:
    """What can be done on `machine` with the packages `found` and the probed backends. Commands name `bundle`."""
    lacking = [package for package in found if package.extra == "export" and package.problem]
    yield Ability(
        "export",
        not lacking,
        "needs " + ", ".join(f"{package.name} ({package.problem})" for package in lacking) if lacking else None,
        install_command("export") if lacking else None,
    )
    onnxruntime = any(installed_version(name) for name in EXCLUSIVE)
    yield Ability("sample on the CPU", onnxruntime, *((None, None) if onnxruntime else ("no ONNX Runtime", install_command("cpu"))))
    yield _cuda_ability(machine)
    for probe in probes:
        yield _build_ability(probe, machine, bundle)
        yield _run_ability(probe, machine, bundle)


def _cuda_ability(machine: Machine) -> Ability:
    """ONNX Runtime on the GPU. Whether its CUDA libraries are there shows when a bundle is loaded."""
    reason, fix = None, None
    if not machine.gpus:
        reason, fix = _no_gpu(machine)
    elif installed_version("onnxruntime-gpu") is None:
        reason, fix = "onnxruntime-gpu is not installed", INSTALL
    return Ability("sample on the GPU with ONNX Runtime", reason is None, reason, fix)


def _build_ability(probe: BackendProbe, machine: Machine, bundle: Path) -> Ability:
    flavour = FLAVOURS[probe.backend]
    reason, fix = probe.reason, probe.fix
    if reason is None and not flavour.ahead_of_time and not machine.gpus:
        reason, fix = "building requires a GPU", engines_command(bundle, "tensorrt-rtx")
    return Ability(f"build {flavour.title} engines", reason is None, reason, fix)


def _run_ability(probe: BackendProbe, machine: Machine, bundle: Path) -> Ability:
    unsupported = [unsupported_reason(probe.backend, gpu.compute_capability) for gpu in machine.gpus]
    reasons, fix = [], probe.fix
    if not machine.gpus:
        reason, driver_fix = _no_gpu(machine)
        reasons.append(reason)
        fix = fix or driver_fix or generate_command(bundle, "onnxruntime")
    if probe.reason is not None:
        reasons.append(probe.reason)
    if all(unsupported):
        reasons += dict.fromkeys(filter(None, unsupported))
    elif unsupported[0] and not reasons:  # without a choice, engines run on the first GPU
        fix = f"--device {unsupported.index(None)}"
    return Ability(f"run {FLAVOURS[probe.backend].title} engines", not reasons, "; ".join(reasons) or None, fix)


def _no_gpu(machine: Machine) -> tuple[str, str | None]:
    """Why `machine` has no GPU, and the fix if there is one."""
    if machine.cuda_error is None:
        return "no NVIDIA GPU or no driver", None
    failure = find_failure(machine.cuda_error)
    return f"NVIDIA's driver finds no GPU: {machine.cuda_error}", failure.fix if failure else None


def _verdict(ability: Ability) -> str:
    if ability.possible:
        return f"yes, with {ability.fix}" if ability.fix else "yes"
    return f"no: {ability.reason}" + (f" ({ability.fix})" if ability.fix else "")


def _machine_text(machine: Machine) -> str:
    memory = size(machine.memory_bytes) if machine.memory_bytes else "unknown"
    rows = [
        ("python", f"{machine.python} ({machine.executable})"),
        ("platform", machine.platform),
        ("processor", f"{machine.processor}, {plural(machine.cores, 'core')}"),
        ("memory", memory),
    ]
    for gpu in machine.gpus:
        details = [f"compute capability {gpu.compute_capability}"]
        details += [size(gpu.memory_bytes)] if gpu.memory_bytes else []
        details += [f"driver {gpu.driver}"] if gpu.driver else []
        rows.append(("gpu", f"{gpu.name}, {', '.join(details)}"))
        rows.append(("", f"backends for it: {', '.join(backends_for(gpu.compute_capability))}"))
    if not machine.gpus:
        why = "no NVIDIA driver found" if machine.cuda_error is None else f"NVIDIA's driver says {machine.cuda_error}"
        rows.append(("gpu", f"none ({why})"))
    return table(rows)


def _packages_text(found: list[Package]) -> str:
    rows = []
    for package in found:
        state = package.version or "missing"
        if package.version and package.problem:
            state = f"{package.version} ({package.problem})"
        rows.append((package.name, state, PURPOSES.get(package.extra, package.extra), package.install if package.problem else ""))
    return table(rows, ("package", "version", "needed for", "install with"))


VERB = Verb(
    name="doctor",
    summary="show what this machine has, what is missing, and the command that installs it",
    description="Shows what this machine has, what it can do, and the command that installs what is missing.",
    example="sana-export doctor",
    add_arguments=add_arguments,
    run=run,
)
