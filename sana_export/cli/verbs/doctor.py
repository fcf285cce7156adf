"""`sana-export doctor`: what this machine has, what is missing, and the line that installs it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from sana_export import __version__
from sana_export.cli.machine import Builder, Machine, probe_builder, this_machine
from sana_export.cli.memory_text import memory_document, memory_needs, memory_text
from sana_export.cli.packages import (
    EXCLUSIVE,
    PURPOSES,
    Package,
    exclusive_conflict,
    install_line,
    installed_version,
    packages,
)
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.text import plural, size, table
from sana_export.cli.verb import Answer, Verb
from sana_export.machine import gpu_memory_bytes
from sana_export.manifest import Manifest
from sana_export.trt.compatibility import RTX_CAPABILITIES
from sana_export.trt.flavour import FLAVOURS


@dataclasses.dataclass(frozen=True)
class Ability:
    """One thing that can be done here or not; `reason` says what is lacking and `fix` mends it."""

    name: str
    possible: bool
    reason: str | None = None
    fix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="say what its engines will need of the GPU's memory")


def run(options: argparse.Namespace, console: Console) -> Answer:
    machine = this_machine()
    try:
        found = packages()
    except PackageNotFoundError:
        found = []
    builders = [probe_builder(backend) for backend in FLAVOURS]
    abilities = list(judge(machine, found, builders))
    conflict = exclusive_conflict()
    document: dict[str, Any] = {
        "sana_export": __version__,
        "machine": dataclasses.asdict(machine),
        "packages": [{**dataclasses.asdict(package), "problem": package.problem} for package in found],
        "backends": [dataclasses.asdict(builder) for builder in builders],
        "abilities": {ability.name: dataclasses.asdict(ability) for ability in abilities},
        "warnings": [conflict] if conflict else [],
    }
    parts = [
        f"sana-export {__version__}",
        _machine_text(machine),
        _packages_text(found) if found else "packages: sana-export is not installed, only its source is here",
        table([(ability.name, _verdict(ability)) for ability in abilities]),
    ]
    if options.bundle is not None:
        bundle = Path(options.bundle)
        memory = memory_needs(bundle, Manifest.load(bundle))
        document["memory"] = memory_document(memory)
        parts.append(memory_text(memory, gpu_memory_bytes(machine.gpus)) or f"{bundle} has no engines")
    if conflict:
        parts.insert(0, f"warning: {conflict}")
    return Answer(document, "\n\n".join(parts))


def judge(machine: Machine, found: list[Package], builders: Iterable[Builder]) -> Iterable[Ability]:
    """What can be done with `found` and `builders` on `machine`."""
    lacking = [package for package in found if package.extra == "export" and package.problem]
    yield Ability(
        "export",
        not lacking,
        "lacks " + ", ".join(f"{package.name} ({package.problem})" for package in lacking) if lacking else None,
        install_line("export") if lacking else None,
    )
    onnxruntime = any(installed_version(name) for name in EXCLUSIVE)
    yield Ability("sample on the CPU", onnxruntime, *((None, None) if onnxruntime else ("no ONNX Runtime", install_line("cpu"))))
    for builder in builders:
        yield _build_ability(builder, machine)
        yield _run_ability(builder, machine)


def _build_ability(builder: Builder, machine: Machine) -> Ability:
    flavour = FLAVOURS[builder.backend]
    reason, fix = builder.reason, builder.fix
    if reason is None and not flavour.ahead_of_time and not machine.gpus:
        reason, fix = "it builds only on a machine with a GPU", "sana-export build BUNDLE --backend tensorrt-rtx"
    return Ability(f"build {flavour.title} engines", reason is None, reason, fix)


def _run_ability(builder: Builder, machine: Machine) -> Ability:
    capabilities = [gpu.compute_capability for gpu in machine.gpus]
    reasons, fix = [], builder.fix
    if not capabilities:
        reasons.append("no NVIDIA GPU and driver here")
        fix = fix or "sana-export generate BUNDLE PROMPT -o OUT.png --backend onnxruntime"
    if builder.reason is not None:
        reasons.append(builder.reason)
    if capabilities and builder.backend == "tensorrt-rtx" and not set(capabilities) & set(RTX_CAPABILITIES):
        reasons.append(f"compute capability {', '.join(capabilities)} is not in NVIDIA's list ({', '.join(RTX_CAPABILITIES)})")
    return Ability(f"run {FLAVOURS[builder.backend].title} engines", not reasons, "; ".join(reasons) or None, fix)


def _verdict(ability: Ability) -> str:
    return "yes" if ability.possible else f"no: {ability.reason} ({ability.fix})"


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
    if not machine.gpus:
        rows.append(("gpu", "none (no NVIDIA driver answers)"))
    return table(rows)


def _packages_text(found: list[Package]) -> str:
    rows = []
    for package in found:
        state = package.version or "missing"
        if package.version and package.problem:
            state = f"{package.version} ({package.problem})"
        rows.append((package.name, state, PURPOSES.get(package.extra, package.extra), package.install if package.problem else ""))
    return table(rows, ("package", "version", "needed to", "install with"))


VERB = Verb(
    name="doctor",
    summary="what this machine has, what is missing, and the line that installs it",
    description="Shows what this machine has, what can be done with it, and the line that installs what is missing.",
    example="sana-export doctor",
    add_arguments=add_arguments,
    run=run,
)
