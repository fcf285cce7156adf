"""The two flavours of TensorRT and everything in which they differ.

Both packages have the same Python API under two module names. Their differences are columns of `FLAVOURS`. The functions below
handle the differences between versions of one package: they ask for a feature before they use it. Sources: NVIDIA's TensorRT and
TensorRT-RTX documentation ("CPU-Only AOT and TensorRT-RTX Engines", "Support Matrix"), and the installed TensorRT-RTX 1.7.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sana_export.environment import operating_system, release
from sana_export.errors import DependencyError, UsageError
from sana_export.machine import gpu_compute_capability

#: `EngineEntry.operating_system` of an engine that runs on every operating system that its backend supports.
ANY_SYSTEM = "any"


@dataclass(frozen=True)
class Flavour:
    """One backend that builds and runs engines."""

    #: Its name on the command line.
    backend: str
    #: Its Python module.
    module: str
    #: Its name in messages.
    title: str
    #: The command that installs it.
    install: str
    #: What the installation needs, in a few words.
    install_note: str
    #: The builder compiles for chosen compute capabilities, without a GPU. Otherwise it compiles for the GPU of this machine.
    ahead_of_time: bool
    #: An engine runs only on the operating system that it was built on.
    bound_to_system: bool
    #: The builder measures kernels and keeps the times in a cache file. TensorRT-RTX selects kernels when it runs instead.
    timing_cache: bool


FLAVOURS: dict[str, Flavour] = {
    flavour.backend: flavour
    for flavour in (
        Flavour(
            backend="tensorrt-rtx",
            module="tensorrt_rtx",
            title="TensorRT-RTX",
            install='pip install "tensorrt-rtx>=1.7"',
            install_note="Linux x86-64 or Windows; building needs no GPU",
            ahead_of_time=True,
            bound_to_system=False,
            timing_cache=False,
        ),
        Flavour(
            backend="tensorrt",
            module="tensorrt",
            title="TensorRT",
            install='pip install "tensorrt>=10.13"',
            install_note="its libraries come from NVIDIA's own package index; building needs a GPU",
            ahead_of_time=False,
            bound_to_system=True,
            timing_cache=True,
        ),
    )
}


@dataclass(frozen=True)
class Target:
    """What an engine is built with and for. It is part of the engine's key."""

    #: The backend that builds it.
    backend: str
    #: The version of the backend's Python module.
    version: str
    #: The GPUs that it is for ("8.9"). Empty: the backend's portable engine.
    compute_capabilities: tuple[str, ...]
    #: The operating system that it runs on, or `ANY_SYSTEM`.
    operating_system: str


def flavour_of(backend: str) -> Flavour:
    """The row of `backend`. Raises UsageError if it is not a TensorRT backend."""
    if backend not in FLAVOURS:
        raise UsageError(f"the backend {backend!r} has no engines", wanted=" or ".join(FLAVOURS))
    return FLAVOURS[backend]


def load(backend: str) -> ModuleType:
    """The Python module of `backend`. Raises DependencyError with the command that installs it if it cannot be imported."""
    flavour = flavour_of(backend)
    try:
        module = importlib.import_module(flavour.module)
    except Exception as error:  # the packages load shared libraries at import, which can raise anything
        raise _missing(flavour, f"{type(error).__name__}: {error}") from error
    if not hasattr(module, "Builder"):
        raise _missing(flavour, f"a module {flavour.module} without its builder ({getattr(module, '__path__', '?')})")
    return module


def target_for(backend: str, module: Any, compute_capabilities: tuple[str, ...] = ()) -> Target:
    """The target of engines that `module` builds on this machine for `compute_capabilities` ("8.9").

    Without any, the target is portable, or this machine's GPU if the backend builds only for that. Raises UsageError for a compute
    capability that the module cannot build for, and DependencyError if the backend needs a GPU and there is none.
    """
    flavour = flavour_of(backend)
    wanted = tuple(sorted(set(compute_capabilities), key=_capability_order))
    if flavour.ahead_of_time:
        possible = tuple(offered_capabilities(module))
    else:
        present = gpu_compute_capability()
        if present is None:
            raise DependencyError(
                f"{flavour.title} builds engines only on a machine with an NVIDIA GPU",
                found="no GPU and driver",
                wanted="the GPU that the engine is for",
                fix="build on the machine with that GPU, or use --backend tensorrt-rtx, which builds without a GPU",
            )
        possible, wanted = (present,), wanted or (present,)
    if unknown := [name for name in wanted if name not in possible]:
        raise UsageError(
            f"{flavour.title} {module.__version__} cannot build for compute capability {', '.join(unknown)} here",
            wanted=", ".join(possible),
            fix="leave out --compute-capability" if not flavour.ahead_of_time else f"--compute-capability {possible[-1]}",
        )
    system = operating_system() if flavour.bound_to_system else ANY_SYSTEM
    return Target(backend, module.__version__, wanted, system)


def check_refittable(target: Target) -> None:
    """Raise DependencyError if refittable engines of this backend's version may compute something else than their graph.

    NVIDIA's page "Refitting an Engine" of TensorRT 11.3 says that the bias of a matrix product can be dropped and taken for zero.
    It names the flag REFIT. Whether REFIT_INDIVIDUAL, which we use, is affected is not known.
    """
    if target.backend == "tensorrt" and release(target.version)[:2] == (11, 3):
        raise DependencyError(
            "TensorRT 11.3 can build refittable engines with wrong results: it may drop the bias of a matrix product",
            found=f"tensorrt {target.version}",
            wanted="another version of TensorRT, or engines with fixed weights",
            fix='pip install "tensorrt>=11.4", or leave out --refittable',
        )


def offered_capabilities(module: Any) -> dict[str, Any]:
    """The compute capabilities ("8.9") that `module` can build for, with their enum members."""
    members = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
    matches = ((re.fullmatch(r"SM(\d+)(\d)", name), member) for name, member in members.items())
    return {f"{match[1]}.{match[2]}": member for match, member in matches if match}


def set_compute_capabilities(module: Any, config: Any, names: tuple[str, ...]) -> None:
    """Set the GPUs that the builder compiles for. Without names the engine is portable, or for this machine's GPU."""
    if not names:
        return
    offered = offered_capabilities(module)
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(offered[name], index)


def network_flags(module: Any) -> int:
    """The creation flags of a strongly typed network. Later versions have no such flag, because all networks are strongly typed."""
    flag = getattr(getattr(module, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _missing(flavour: Flavour, found: str) -> DependencyError:
    return DependencyError(
        f"{flavour.title} is not installed here or does not load ({flavour.install_note})",
        found=found,
        wanted=f"the Python module {flavour.module}",
        fix=flavour.install,
    )


def _capability_order(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in name.split("."))
