"""Which of a bundle's engines this machine can run, and what speaks against each of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sana_export.cli.machine import Gpu, find_gpus
from sana_export.cli.packages import installed_version
from sana_export.environment import operating_system
from sana_export.manifest import EngineEntry
from sana_export.runtime.backends import RUNNABLE
from sana_export.trt.flavour import ANY_SYSTEM, FLAVOURS

#: Compute capabilities that NVIDIA's support matrix of TensorRT-RTX lists.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
NOT_YET = "this version of sana-export builds engines but does not run them yet"


@dataclass(frozen=True)
class Here:
    """What decides: the GPUs, the installed version of each engine backend (None: not installed) and the platform."""

    gpus: Sequence[Gpu]
    versions: Mapping[str, str | None]
    operating_system: str


def here() -> Here:
    """This machine. A backend's distribution is named as the backend, so nothing is imported."""
    return Here(find_gpus(), {backend: installed_version(backend) for backend in FLAVOURS}, operating_system())


def why_not(engine: EngineEntry, machine: Here) -> list[str]:
    """The reasons why `engine` does not run on `machine`, with the fields of its manifest entry by name; empty where it does."""
    flavour, version = FLAVOURS.get(engine.backend), machine.versions.get(engine.backend)
    if flavour is None:
        return [f"backend {engine.backend} is not known to this version of sana-export"]
    reasons = [] if engine.backend in RUNNABLE else [NOT_YET]
    if not machine.gpus:
        reasons.append("no NVIDIA GPU and driver here")
    if version is None:
        reasons.append(f"{flavour.title} is not installed ({flavour.install})")
    elif version != engine.backend_version:
        reasons.append(f"backend_version: built with {flavour.title} {engine.backend_version}, here is {version}")
    if engine.operating_system not in (ANY_SYSTEM, machine.operating_system):
        reasons.append(f"operating_system: built on {engine.operating_system}, here is {machine.operating_system}")
    possible = engine.compute_capabilities or RTX_CAPABILITIES
    present = [gpu.compute_capability for gpu in machine.gpus]
    if present and not set(present) & set(possible):
        built = ", ".join(possible) if engine.compute_capabilities else f"portable ({', '.join(possible)})"
        reasons.append(f"compute_capabilities: built for {built}, here is {', '.join(present)}")
    return reasons
