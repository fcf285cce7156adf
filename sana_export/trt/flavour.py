"""The two flavours of TensorRT, and everything in which they differ.

Both packages share one Python API under two module names. What differs is a column of `FLAVOURS`; what differs
between versions of one package is probed with `getattr` in the functions below. Sources: NVIDIA's TensorRT and
TensorRT-RTX documentation ("CPU-Only AOT and TensorRT-RTX Engines", "Support Matrix"), and the installed TensorRT-RTX
1.7.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sana_export.environment import operating_system
from sana_export.errors import DependencyError, UsageError
from sana_export.machine import gpu_compute_capability

#: `EngineEntry.operating_system` of an engine that runs on every system that its backend supports.
ANY_SYSTEM = "any"


@dataclass(frozen=True)
class Flavour:
    """One backend: its Python module, what installs it, and what its engines are bound to."""

    backend: str
    module: str
    title: str
    install: str
    install_note: str
    #: The builder compiles for chosen compute capabilities on a machine without a GPU; otherwise for the GPU at hand.
    ahead_of_time: bool
    #: An engine runs only on the operating system that it was built on.
    bound_to_system: bool
    #: Kernel timings are measured while building and kept in a cache file (TensorRT-RTX chooses kernels when it runs).
    timing_cache: bool


FLAVOURS: dict[str, Flavour] = {
    flavour.backend: flavour
    for flavour in (
        Flavour(
            backend="tensorrt-rtx",
            module="tensorrt_rtx",
            title="TensorRT-RTX",
            install='pip install "tensorrt-rtx>=1.2"',
            install_note="Linux x86-64 or Windows; building needs no GPU",
            ahead_of_time=True,
            bound_to_system=False,
            timing_cache=False,
        ),
        Flavour(
            backend="tensorrt",
            module="tensorrt",
            title="TensorRT",
            install='pip install "tensorrt>=10.12"',
            install_note="its libraries come from NVIDIA's own package index; to build it needs a GPU",
            ahead_of_time=False,
            bound_to_system=True,
            timing_cache=True,
        ),
    )
}


@dataclass(frozen=True)
class Target:
    """What an engine is built with and for; part of its key. No compute capability means the backend's portable engine."""

    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    operating_system: str


def flavour_of(backend: str) -> Flavour:
    """The row of `backend`; UsageError where it is no TensorRT backend."""
    if backend not in FLAVOURS:
        raise UsageError(f"no engines are built for the backend {backend!r}", wanted=" or ".join(FLAVOURS))
    return FLAVOURS[backend]


def load(backend: str) -> ModuleType:
    """The Python module of `backend`. Raises DependencyError with the line that installs it where it does not import."""
    flavour = flavour_of(backend)
    try:
        module = importlib.import_module(flavour.module)
    except Exception as error:  # the packages load shared libraries at import and raise whatever that raises
        raise _missing(flavour, f"{type(error).__name__}: {error}") from error
    if not hasattr(module, "Builder"):
        raise _missing(flavour, f"a module {flavour.module} without its builder ({getattr(module, '__path__', '?')})")
    return module


def target_for(backend: str, module: Any, compute_capabilities: tuple[str, ...] = ()) -> Target:
    """The target of engines that `module` builds here for `compute_capabilities` ("8.9"; none: portable, or this GPU).

    Raises UsageError for a compute capability that the module cannot build for, DependencyError where a GPU is needed
    and there is none.
    """
    flavour = flavour_of(backend)
    wanted = tuple(sorted(set(compute_capabilities), key=_capability_order))
    if flavour.ahead_of_time:
        possible = tuple(offered_capabilities(module))
    else:
        here = gpu_compute_capability()
        if here is None:
            raise DependencyError(
                f"{flavour.title} builds engines only on a machine with an NVIDIA GPU",
                found="no GPU and driver",
                wanted="the GPU that the engine is for",
                fix="build there, or add --backend tensorrt-rtx, which needs no GPU to build",
            )
        possible, wanted = (here,), wanted or (here,)
    if unknown := [name for name in wanted if name not in possible]:
        raise UsageError(
            f"{flavour.title} {module.__version__} cannot build for compute capability {', '.join(unknown)} here",
            wanted=", ".join(possible),
            fix="leave out --compute-capability" if not flavour.ahead_of_time else f"--compute-capability {possible[-1]}",
        )
    system = operating_system() if flavour.bound_to_system else ANY_SYSTEM
    return Target(backend, module.__version__, wanted, system)


def offered_capabilities(module: Any) -> dict[str, Any]:
    """The compute capabilities ("8.9") that `module` can be told to build for, with their enum members."""
    members = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
    matches = ((re.fullmatch(r"SM(\d+)(\d)", name), member) for name, member in members.items())
    return {f"{match[1]}.{match[2]}": member for match, member in matches if match}


def set_compute_capabilities(module: Any, config: Any, names: tuple[str, ...]) -> None:
    """Tell the builder's `config` which GPUs to compile for; without names the engine is portable, or for the GPU here."""
    if not names:
        return
    offered = offered_capabilities(module)
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(offered[name], index)


def network_flags(module: Any) -> int:
    """Creation flags of a strongly typed network: asked for where the version has the flag, later versions know no other."""
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
