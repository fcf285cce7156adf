"""PyTorch: the deployment graphs themselves, eager or compiled, with neither ONNX nor diffusers.

For parity, and as a fast path where no TensorRT can be installed. The only part of the runtime that imports torch and the
deployment graphs, and only when one of its backends is opened. The weights are the checkpoint's, which is opened again: a bundle
holds them in the form that ONNX reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sana_export.adapters import Lora
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.commands import export_line
from sana_export.contract import GraphSpec
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.formats.arrays import Array
from sana_export.graphs.builders import build_graph
from sana_export.graphs.denoiser import Block
from sana_export.graphs.vae_blocks import EfficientViTBlock, ResBlock, Upsample
from sana_export.manifest import Checkpoint, Manifest
from sana_export.runtime.backends.base import (
    DEFAULT_SETTINGS,
    Backend,
    BackendSettings,
    CapturingBackend,
    DeviceTensor,
    EnqueuedSession,
)

log = logging.getLogger(__name__)

#: What the large graphs are made of over and over, and the methods that are compiled: each once for all its repetitions, which
#: takes seconds where a whole graph takes minutes.
COMPILED: dict[type[nn.Module], tuple[str, ...]] = {
    Block: ("self_attention", "cross_attention", "feed_forward"),
    ResBlock: ("forward",),
    EfficientViTBlock: ("forward",),
    Upsample: ("forward",),
}
#: Compilers that torch.compile calls on each device, where the variables CXX and CC do not name one.
COMPILERS = {"cpu": ("CXX", ("g++", "clang++", "cl")), "cuda": ("CC", ("gcc", "clang", "cc", "cl"))}
#: Settings of PyTorch by which products of float32 tensors, or sums of float16 products, would be rounded on the way.
_ROUNDING: tuple[tuple[Any, str], ...] = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (torch.backends.cudnn, "allow_tf32"),
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class TorchSession(EnqueuedSession):
    """One deployment graph on a device, without gradients."""

    def __init__(self, spec: GraphSpec, module: nn.Module, device: str, threads: int | None = None) -> None:
        self.spec, self.module, self.device, self.threads = spec, module, device, threads
        self._has_run = False

    @property
    def capturable(self) -> bool:
        """Whatever a first run compiles or allocates is there afterwards."""
        return self._has_run

    def run(
        self, feeds: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor] | None = None
    ) -> dict[str, DeviceTensor]:
        inputs = [place(feeds[tensor.name], self.device) for tensor in self.spec.inputs]
        try:
            with torch.no_grad(), exact_products(), cpu_threads(self.threads):
                results = self.module(*inputs)
        except RuntimeError as error:
            raise_out_of_memory(error, f"running {self.spec.name}", self.device)
            raise
        self._has_run = True
        found = dict(zip((tensor.name for tensor in self.spec.outputs), _tuple(results), strict=True))
        for name, target in (outputs or {}).items():
            found[name] = target.copy_(found[name])
        return found

    def refit(self, weights: Mapping[str, Array]) -> None:
        """In place, so that captured work reads the new weights too. A parameter is called as the initializer in the ONNX file."""
        targets = {name: self.module.get_parameter(name) for name in weights}
        with torch.no_grad():
            for name, values in weights.items():
                given = torch.from_numpy(np.array(values))
                targets[name].copy_(given.view(torch.bfloat16) if given.dtype == torch.uint16 else given)


class TorchTable(Sequence[Tensor]):
    """The rows of one tensor `whole`."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self._rows = whole, whole.unbind(0)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)


class TorchBackend(Backend):
    """The deployment graphs of a bundle's checkpoint in PyTorch, on the CPU. `compiled`: their blocks through torch.compile."""

    device = "cpu"

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        checkpoint: SanaCheckpoint,
        settings: BackendSettings = DEFAULT_SETTINGS,
        *,
        compiled: bool,
    ) -> None:
        self.name = "torch-compile" if compiled else "torch"
        settings.reject_options(self.name)
        self.bundle, self.manifest, self.checkpoint, self.compiled = bundle, manifest, checkpoint, compiled
        self.torch_device, self._threads = torch_device(self.device, settings.device), settings.threads

    def load(self, graph: str) -> TorchSession:
        try:
            module = build_graph(graph, self.checkpoint, self.manifest.options).to(self.torch_device)
        except RuntimeError as error:
            raise_out_of_memory(error, f"loading {graph}", self.device)
            raise
        if self.compiled:
            compile_blocks(module)
        return TorchSession(self.manifest.graphs[graph].spec, module, self.torch_device, self._threads)

    def to_device(self, array: Array) -> Tensor:
        return place(array, self.torch_device)

    def to_host(self, value: Tensor | Array) -> Array:
        return value if isinstance(value, np.ndarray) else value.cpu().numpy()


class CudaTorchBackend(TorchBackend, CapturingBackend):
    """The same on a GPU, where sessions only enqueue their work, and the sampling loop is captured as a CUDA graph."""

    device = "cuda"
    #: Prompts of about one length share their compiled blocks and captured loops.
    text_multiple = 32
    #: Captured work keeps the memory that it was captured with.
    generation = 0

    def zeros(self, shape: Sequence[int], dtype: str | torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=_dtype(dtype), device=self.torch_device)

    def table(self, rows: int, shape: Sequence[int], dtype: str | torch.dtype) -> Sequence[Tensor]:
        return TorchTable(self.zeros((rows, *shape), dtype))

    def write(self, target: Tensor, value: Tensor | Array) -> None:
        target.copy_(place(value, "cpu") if isinstance(value, np.ndarray) else value)

    def write_table(self, target: Sequence[Tensor], rows: Array) -> None:
        assert isinstance(target, TorchTable)  # `table` made it
        target.whole.copy_(place(rows, "cpu").view(target.whole.shape))

    def copy(self, value: Tensor) -> Tensor:
        return value.clone()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.torch_device), torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            raise_out_of_memory(error, "capturing the sampling loop", self.device)
            raise
        return graph.replay

    def record_event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def open_torch(bundle: Path, manifest: Manifest, settings: BackendSettings = DEFAULT_SETTINGS, *, compiled: bool) -> TorchBackend:
    """The backend `torch`, or `torch-compile`, on the GPU where PyTorch finds one.

    Raises ArtifactError where the checkpoint that the bundle was made from is not there any more, DependencyError where
    torch.compile lacks a compiler.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if compiled:
        require_compiler(device)
    backend = CudaTorchBackend if device == "cuda" else TorchBackend
    return backend(bundle, manifest, reopen(bundle, manifest), settings, compiled=compiled)


def reopen(bundle: Path, manifest: Manifest) -> SanaCheckpoint:
    """The checkpoint that the manifest names, once it hashes to what the manifest says."""
    recorded, fix = manifest.checkpoint, export_line(bundle, manifest)
    try:
        checkpoint = _open(recorded)
        found = checkpoint.sha256
    except (UsageError, ArtifactError, OSError) as error:
        raise ArtifactError(
            f"the torch backend reads the weights of the checkpoint that {bundle} was made from, and cannot open it",
            found=error.message if not isinstance(error, OSError) else error,
            wanted=f"{recorded.source}, of hash {recorded.sha256[:16]}",
            fix=f"put it back or, from another place: {fix}",
        ) from error
    if found != recorded.sha256:
        raise ArtifactError(
            f"the checkpoint that {bundle} was made from has changed since",
            found=f"{recorded.source} with weights and configs of hash {found[:16]}",
            wanted=f"hash {recorded.sha256[:16]}",
            fix=fix,
        )
    return checkpoint


def _open(recorded: Checkpoint) -> SanaCheckpoint:
    return open_checkpoint(
        recorded.source,
        revision=recorded.revision,
        weights_variant=recorded.weights_variant,
        transformer=Path(recorded.transformer.path) if recorded.transformer else None,
        loras=[Lora(Path(overlay.path), overlay.scale) for overlay in recorded.loras],
    )


def compile_blocks(module: nn.Module) -> None:
    """Let torch.compile work on the parts of `module` that `COMPILED` names, when they run first."""
    for part in module.modules():
        for method in COMPILED.get(type(part), ()):
            setattr(part, method, torch.compile(getattr(part, method)))


def require_compiler(device: str) -> None:
    """Raise DependencyError where torch.compile cannot work on `device`."""
    variable, names = COMPILERS[device]
    lacking = None
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        lacking, wanted, fix = "no module triton", "Triton, which PyTorch's CUDA builds bring on Linux", "pip install triton"
    elif not os.environ.get(variable) and not any(map(shutil.which, names)):
        lacking, wanted, fix = f"none of {', '.join(names)}, and no {variable}", "a C++ compiler", "install g++ or set " + variable
    if lacking is not None:
        raise DependencyError(
            f"the backend torch-compile needs a compiler for the {device}",
            found=lacking,
            wanted=wanted,
            fix=f"{fix}, or --backend torch",
        )


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products at the precision that the graph says. PyTorch's settings are the process's: they are put back afterwards."""
    before = [getattr(owner, name) for owner, name in _ROUNDING]
    for owner, name in _ROUNDING:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for (owner, name), value in zip(_ROUNDING, before, strict=True):
            setattr(owner, name, value)


def torch_device(kind: str, index: int | None) -> str:
    """PyTorch's name of the device. Raises UsageError if there is no GPU of that index."""
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if index is None:
        return kind
    if not 0 <= index < count:
        raise UsageError(f"there is no GPU {index}", found=f"{count} GPUs that PyTorch can use", wanted="the index of one of them")
    return f"{kind}:{index}"


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run with `count` threads on the CPU. PyTorch's setting is the process's: it is restored afterwards."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def place(value: DeviceTensor | Array, device: str) -> Tensor:
    """The tensor of `value` on `device`; on the CPU it shares the memory of an array that may be written to."""
    if not isinstance(value, np.ndarray):
        return value
    array = np.ascontiguousarray(value)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).reshape(value.shape).to(device)


def raise_out_of_memory(error: RuntimeError, doing: str, device: str) -> None:
    """Raise DependencyError if that is what `error` means."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError) or any(words in text.lower() for words in _OUT_OF_MEMORY):
        raise DependencyError(
            f"out of memory while {doing} with torch on the {device}",
            found=text,
            wanted="more free memory",
            fix="ask for fewer images at once or a smaller size, or free memory",
        ) from error


def _dtype(name: str | torch.dtype) -> torch.dtype:
    return name if isinstance(name, torch.dtype) else getattr(torch, name)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
