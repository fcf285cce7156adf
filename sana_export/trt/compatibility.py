"""Which of a bundle's engines this machine can run, and what speaks against each of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sana_export.environment import installed_version, operating_system, release
from sana_export.errors import UsageError
from sana_export.machine import Gpu, find_gpus
from sana_export.manifest import EngineEntry
from sana_export.trt.flavour import ANY_SYSTEM, FLAVOURS

#: Compute capabilities that NVIDIA's support matrix of TensorRT-RTX lists.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
#: The least compute capability that an engine built with --hardware-compatible runs on.
HARDWARE_COMPATIBLE_FROM = (8, 0)


@dataclass(frozen=True)
class Host:
    """What decides: the GPUs, the installed version of each engine backend (None: not installed) and the platform."""

    gpus: Sequence[Gpu]
    versions: Mapping[str, str | None]
    operating_system: str


def detect_host(device: int | None = None) -> Host:
    """This machine, with all its GPUs or only the one of index `device`.

    A backend's distribution is named as the backend, so nothing is imported. Raises UsageError if there is no such GPU.
    """
    gpus = find_gpus()
    if device is not None:
        if not 0 <= device < len(gpus):
            raise UsageError(
                f"there is no GPU {device}",
                found=", ".join(f"{index}: {gpu.name}" for index, gpu in enumerate(gpus)) or "no NVIDIA GPU",
                wanted="the index of one of them",
                fix="sana-export doctor",
            )
        gpus = gpus[device : device + 1]
    return Host(gpus, {backend: installed_version(backend) for backend in FLAVOURS}, operating_system())


def incompatibilities(engine: EngineEntry, machine: Host) -> list[str]:
    """The reasons why `engine` does not run on `machine`, with the fields of its manifest entry by name; empty where it does."""
    flavour, version = FLAVOURS.get(engine.backend), machine.versions.get(engine.backend)
    if flavour is None:
        return [f"backend {engine.backend} is not known to this version of sana-export"]
    reasons = []
    if not machine.gpus:
        reasons.append("no NVIDIA GPU and driver here")
    if version is None:
        reasons.append(f"{flavour.title} is not installed ({flavour.install})")
    elif not _version_fits(engine, version):
        reasons.append(f"backend_version: built with {flavour.title} {engine.backend_version}, here is {version}")
    if engine.operating_system not in (ANY_SYSTEM, machine.operating_system):
        reasons.append(f"operating_system: built on {engine.operating_system}, here is {machine.operating_system}")
    present = [gpu.compute_capability for gpu in machine.gpus]
    if present and not any(_gpu_fits(engine, capability) for capability in present):
        reasons.append(f"compute_capabilities: built for {_built_for(engine)}, here is {', '.join(present)}")
    return reasons


def _version_fits(engine: EngineEntry, version: str) -> bool:
    """Engines run on the version that built them; version-compatible ones also on later ones of its major version."""
    if version == engine.backend_version:
        return True
    built, here = release(engine.backend_version), release(version)
    return bool(engine.options.get("version_compatible")) and built[:1] == here[:1] and here >= built


def _gpu_fits(engine: EngineEntry, capability: str) -> bool:
    if engine.options.get("hardware_compatible"):
        return release(capability) >= HARDWARE_COMPATIBLE_FROM
    return capability in (engine.compute_capabilities or RTX_CAPABILITIES)


def _built_for(engine: EngineEntry) -> str:
    if engine.options.get("hardware_compatible"):
        return "{}.{} and later".format(*HARDWARE_COMPATIBLE_FROM)
    return ", ".join(engine.compute_capabilities) or f"portable ({', '.join(RTX_CAPABILITIES)})"
