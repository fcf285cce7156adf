"""Which of a bundle's engines this machine can run, and why it cannot run the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sana_export.cuda_errors import find_failure
from sana_export.environment import installed_version, operating_system, release
from sana_export.gpu_support import RTX_PORTABLE, backends_for, unsupported_reason
from sana_export.machine import Gpu, find_cuda_error, find_gpus, require_gpu
from sana_export.manifest import EngineEntry
from sana_export.trt.flavour import ANY_SYSTEM, FLAVOURS, Target
from sana_export.trt.options import BuildOptions

#: The lowest compute capability that an engine built with --hardware-compatible runs on.
HARDWARE_COMPATIBLE_FROM = (8, 0)


@dataclass(frozen=True)
class Host:
    """What decides whether an engine runs on a machine."""

    #: The GPU that engines would run on. Empty if there is none.
    gpus: Sequence[Gpu]
    #: The installed version of each engine backend, or None if it is not installed.
    versions: Mapping[str, str | None]
    #: Its platform, as `environment.operating_system` names it.
    operating_system: str
    #: Why NVIDIA's driver finds no GPU (`machine.find_cuda_error`).
    cuda_error: str | None = None


def detect_host(device: int | None = None) -> Host:
    """This machine with the GPU that CUDA numbers `device`, by default the first one, which engines run on.

    Nothing is imported: the versions come from the metadata of the installed packages, which have the names of the backends. Raises
    UsageError if there is no GPU of that number.
    """
    if device is not None:
        require_gpu(device)
    first = device or 0
    versions = {backend: installed_version(backend) for backend in FLAVOURS}
    return Host(find_gpus()[first : first + 1], versions, operating_system(), find_cuda_error())


def incompatibilities(engine: EngineEntry, host: Host) -> list[str]:
    """The reasons why `engine` does not run on `host`, with the names of its manifest fields. Empty if it runs."""
    if engine.backend not in FLAVOURS:
        return [f"backend {engine.backend} is not known to this version of sana-export"]
    return [*missing_parts(engine.backend, host), *mismatches(engine, host)]


def missing_parts(backend: str, host: Host) -> dict[str, str]:
    """What `host` lacks to run any engine of `backend`: each reason with its fix. Other engines would not help."""
    flavour = FLAVOURS[backend]
    missing = {}
    if host.cuda_error is not None:
        failure = find_failure(host.cuda_error)
        missing[f"NVIDIA's driver finds no GPU here: {host.cuda_error}"] = failure.fix if failure else "sana-export doctor"
    elif not host.gpus:
        missing["no NVIDIA GPU and driver here"] = (
            "run sana-export doctor to see what was found, or use --backend onnxruntime, which needs no GPU"
        )
    elif not _supported(backend, host.gpus):
        gpu = host.gpus[0]
        reason = f"{unsupported_reason(backend, gpu.compute_capability)} ({gpu.name})"
        missing[reason] = f"use --backend {' or '.join(backends_for(gpu.compute_capability))}"
    if host.versions.get(backend) is None:
        missing[f"{flavour.title} is not installed ({flavour.install})"] = flavour.install
    return missing


def mismatches(engine: EngineEntry, host: Host) -> list[str]:
    """The reasons why `host` would need another engine than `engine`. What is missing from `host` does not count."""
    reasons = []
    version = host.versions.get(engine.backend)
    if version is not None and not _version_fits(engine, version):
        built_with = f"{FLAVOURS[engine.backend].title} {engine.backend_version}"
        reasons.append(f"backend_version: built with {built_with}, here is {version}")
    if engine.operating_system not in (ANY_SYSTEM, host.operating_system):
        reasons.append(f"operating_system: built on {engine.operating_system}, here is {host.operating_system}")
    present = _supported(engine.backend, host.gpus)
    if present and not any(_fits(engine.compute_capabilities, _hardware_compatible(engine), name) for name in present):
        reasons.append(f"compute_capabilities: built for {_built_for(engine)}, here is {', '.join(present)}")
    return reasons


def build_options(backend: str, gpus: Sequence[Gpu]) -> list[str]:
    """The options of `build` without which `backend` builds no engine for any of `gpus`; empty if there are none."""
    if backend != "tensorrt-rtx" or not gpus or any(gpu.compute_capability in RTX_PORTABLE for gpu in gpus):
        return []
    named = _supported(backend, gpus)
    return ["--compute-capability", *dict.fromkeys(named)] if named else []


def not_for_here(target: Target, options: BuildOptions, gpus: Sequence[Gpu]) -> str | None:
    """What to tell someone who builds engines for `target` that none of this machine's `gpus` runs. None if one does."""
    supported = _supported(target.backend, gpus)
    if not gpus or any(_fits(target.compute_capabilities, options.hardware_compatible, name) for name in supported):
        return None
    here = ", ".join(f"{gpu.name}, compute capability {gpu.compute_capability}" for gpu in gpus)
    if supported:
        advice = f"add --compute-capability {' '.join(dict.fromkeys(supported))}"
    else:
        advice = f"use --backend {' or '.join(backends_for(gpus[0].compute_capability))}"
    return f"these engines do not run on the GPU of this machine ({here}); to run them here, {advice}"


def _supported(backend: str, gpus: Iterable[Gpu]) -> list[str]:
    """The compute capabilities of those of `gpus` that `backend` runs on."""
    capabilities = (gpu.compute_capability for gpu in gpus)
    return [capability for capability in capabilities if unsupported_reason(backend, capability) is None]


def _version_fits(engine: EngineEntry, version: str) -> bool:
    """An engine runs on the version that built it. A version-compatible one also runs on later versions with the same major one."""
    if version == engine.backend_version:
        return True
    built, installed = release(engine.backend_version), release(version)
    return bool(engine.options.get("version_compatible")) and built[:1] == installed[:1] and installed >= built


def _fits(compute_capabilities: tuple[str, ...], hardware_compatible: bool, capability: str) -> bool:
    """Whether an engine that was built for these compute capabilities runs on a GPU of `capability`."""
    if hardware_compatible:
        return release(capability) >= HARDWARE_COMPATIBLE_FROM
    return capability in (compute_capabilities or RTX_PORTABLE)


def _hardware_compatible(engine: EngineEntry) -> bool:
    return bool(engine.options.get("hardware_compatible"))


def _built_for(engine: EngineEntry) -> str:
    if _hardware_compatible(engine):
        return "{}.{} and later".format(*HARDWARE_COMPATIBLE_FROM)
    return ", ".join(engine.compute_capabilities) or f"portable ({', '.join(RTX_PORTABLE)})"
