"""ONNX Runtime on NVIDIA's TensorRT-RTX provider: the package onnxruntime-ep-nv-tensorrt-rtx, which is an alpha version.

The provider compiles a graph when it is loaded, so a bundle needs no engines. Its package contains TensorRT-RTX. The names of its
options are those of `tensorrt_rtx_provider_options.h` in the package, version 0.5.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sana_export.contract import GraphSpec
from sana_export.cuda_errors import find_failure
from sana_export.errors import DependencyError, UsageError, first_line
from sana_export.gpu_support import backends_for, unsupported_reason
from sana_export.installation import install_command
from sana_export.machine import find_cuda_error, find_gpus, require_gpu
from sana_export.manifest import Manifest
from sana_export.numeric import shown
from sana_export.profiles import PROFILES, Profile, Range, explain_outside, profile_named
from sana_export.records import GraphEntry
from sana_export.runtime.backends.base import DEFAULT_SETTINGS, BackendSettings
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend, import_onnxruntime
from sana_export.runtime.backends.onnxruntime_provider import RTX, Provider, cuda_failures
from sana_export.trt.bundle import read_instruction_tokens
from sana_export.trt.plan import KEY_CHARACTERS, dynamic_axes, onnx_sha256, profile_ranges

log = logging.getLogger(__name__)

NAME = "onnxruntime-tensorrt-rtx"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
#: The key of `backend_options` with the name of a profile (`profiles.profile_named`), and its default.
PROFILE, DEFAULT_PROFILE = "profile", "default"
#: ONNX Runtime refuses to load a graph of which it would run a node on the CPU.
_NOTHING_ON_THE_CPU = ("session.disable_cpu_ep_fallback", "1")
_REGISTERING = threading.Lock()


class RtxProvider(Provider):
    """The provider on the GPU that CUDA numbers `number`, for shapes in `ranges` (the axes of `contract.DYNAMIC_AXES`).

    Raises DependencyError if the package, the driver or a GPU that it supports is missing, and UsageError if there is no such GPU.
    """

    name = RTX
    precisions = ("fp32", "fp16", "bf16")

    def __init__(self, onnxruntime: Any, bundle: Path, ranges: Mapping[str, Range], number: int = 0) -> None:
        self._bundle, self._ranges, self.number = bundle, ranges, number
        self._device = _find_device(onnxruntime, number)

    def session(self, onnxruntime: Any, graph: GraphEntry, path: Path, options: Any, extra: Mapping[str, str]) -> Any:
        options.add_session_config_entry(*_NOTHING_ON_THE_CPU)
        options.add_provider_for_devices([self._device], {**shape_options(graph.spec, self._ranges), **self._cache(graph), **extra})
        with cuda_failures(f"loading {graph.spec.name}", "cuda"):
            return onnxruntime.InferenceSession(str(path), options)

    def _cache(self, graph: GraphEntry) -> dict[str, str]:
        """The option with the folder for compiled kernels. None if the bundle cannot be written, or if a link leads out of it."""
        folder = self._bundle / "engines" / NAME / onnx_sha256(graph)[:KEY_CHARACTERS]
        try:
            if any(place.is_symlink() for place in (folder, *folder.parents[:2])):
                return {}
            folder.mkdir(parents=True, exist_ok=True)
            if any(place.is_symlink() for place in folder.rglob("*")) or not os.access(folder, os.W_OK):
                return {}
        except OSError as error:
            log.info("kernels are not kept in %s: %s", folder, error)
            return {}
        return {"nv_runtime_cache_path": str(folder)}


class OnnxRuntimeRtxBackend(OnnxRuntimeBackend):
    """Loads the ONNX graphs of a bundle on the TensorRT-RTX provider.

    `settings.options` may name a "profile" (default: "default"), which says for what shapes the graphs are compiled. Its other
    options are those of `OnnxRuntimeBackend`. Raises what `RtxProvider` raises, and UsageError for an unknown profile.
    """

    name = NAME
    text_multiple = 32  # so that prompts of similar length have shapes that kernels were compiled for

    def __init__(self, bundle: Path, manifest: Manifest, settings: BackendSettings = DEFAULT_SETTINGS) -> None:
        options = dict(settings.options)
        self._profile = _profile(options.pop(PROFILE, DEFAULT_PROFILE))
        self._instruction_tokens = read_instruction_tokens(bundle)
        self._ranges = profile_ranges(manifest, self._profile, self._instruction_tokens)
        provider = RtxProvider(import_onnxruntime(), bundle, self._ranges, settings.device or 0)
        super().__init__(bundle, manifest, replace(settings, options=options), provider=provider)

    def ranges(self, graph: str) -> Mapping[str, Range]:
        return {axis: self._ranges[axis] for axis in dynamic_axes(self.manifest.graphs[graph].spec)}

    def check_supported(self, graphs: Iterable[str], axes: Mapping[str, int]) -> None:
        graphs = list(graphs)
        for graph in graphs:
            if (why := explain_outside(self.ranges(graph), axes)) is not None:
                raise UsageError(
                    f"the profile {self._profile.name} does not cover this request",
                    found=f"{graph}: {why}",
                    wanted="a request within it, or another profile",
                    fix=self._another_profile(graphs, axes),
                )

    def _another_profile(self, graphs: Iterable[str], axes: Mapping[str, int]) -> str:
        """The call that covers a request, or what runs it without a profile."""
        needed = {axis for graph in graphs for axis in dynamic_axes(self.manifest.graphs[graph].spec)}
        for name, profile in PROFILES.items():
            ranges = profile_ranges(self.manifest, profile, self._instruction_tokens)
            if explain_outside({axis: ranges[axis] for axis in needed}, axes) is None:
                return f"from_pretrained({str(self.bundle)!r}, backend={NAME!r}, backend_options={{{PROFILE!r}: {name!r}}})"
        return "--backend onnxruntime"


def shape_options(spec: GraphSpec, ranges: Mapping[str, Range]) -> dict[str, str]:
    """The provider's options for the shapes of a graph: name:1x32x16x16,... of every input with a dynamic axis."""
    dynamic = [tensor for tensor in spec.inputs if any(isinstance(axis, str) for axis in tensor.shape)]
    options = {}
    for position, kind in enumerate(("min", "opt", "max")):
        shapes = (
            f"{tensor.name}:" + "x".join(str(ranges[axis][position] if isinstance(axis, str) else axis) for axis in tensor.shape)
            for tensor in dynamic
        )
        options[f"nv_profile_{kind}_shapes"] = ",".join(shapes)
    return options if dynamic else {}


def _profile(name: Any) -> Profile:
    if not isinstance(name, str):
        wanted = f'a text such as "{DEFAULT_PROFILE}"'
        raise UsageError(f"{PROFILE} in backend_options is not a name", found=shown(name), wanted=wanted)
    return profile_named(name)


def _find_device(onnxruntime: Any, number: int) -> Any:
    """ONNX Runtime's OrtEpDevice of the GPU that CUDA numbers `number`."""
    _check_gpu(number)
    _register(onnxruntime)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == RTX]
    if number < len(devices):
        return devices[number]
    raise DependencyError(
        f"{PACKAGE} offers no GPU {number}",
        found=f"{len(devices)} devices of {RTX}",
        wanted="an NVIDIA GPU and a driver for CUDA 13",
        fix="sana-export doctor",
    )


def _check_gpu(number: int) -> None:
    """Raise DependencyError unless there is an NVIDIA GPU that the provider supports, UsageError if there is no GPU `number`."""
    gpus = find_gpus()
    if not gpus:
        error = find_cuda_error()
        failure = find_failure(error) if error else None
        raise DependencyError(
            f"the backend {NAME} needs an NVIDIA GPU",
            found=error or "no NVIDIA GPU and driver",
            wanted="an NVIDIA GPU and a driver for CUDA 13",
            fix=failure.fix
            if failure
            else "use --backend onnxruntime, which needs no GPU; sana-export doctor shows what was found",
        )
    require_gpu(number)
    capability = gpus[number].compute_capability
    if (reason := unsupported_reason(NAME, capability)) is not None:
        raise DependencyError(
            f"the backend {NAME} does not run on {gpus[number].name}",
            found=f"compute capability {capability}",
            wanted=reason,
            fix=f"use --backend {' or '.join(backends_for(capability))}",
        )


def _register(onnxruntime: Any) -> None:
    """Make the provider known to ONNX Runtime, once in this process."""
    with _REGISTERING:
        if any(device.ep_name == RTX for device in onnxruntime.get_ep_devices()):
            return
        try:
            import onnxruntime_ep_nv_tensorrt_rtx as package
        except ImportError as error:
            raise DependencyError(
                f"the backend {NAME} is not installed", found=error, wanted=PACKAGE, fix=install_command("cpu", NAME)
            ) from error
        try:
            onnxruntime.register_execution_provider_library(package.get_ep_name(), package.get_library_path())
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise DependencyError(
                f"onnxruntime {onnxruntime.__version__} cannot load {PACKAGE}",
                found=first_line(error),
                wanted="an NVIDIA driver for CUDA 13, and onnxruntime 1.26 or later",
                fix=install_command("cpu", NAME),
            ) from error
