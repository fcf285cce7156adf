"""PyTorch: runs the deployment graphs themselves, eager or compiled, without ONNX and diffusers.

It is for parity checks, and fast if TensorRT cannot be installed. This is the only part of the runtime that imports torch and the
deployment graphs, and it is imported only when one of its backends is opened. The weights come from the checkpoint, which is opened
again, because a bundle has them only in ONNX files.
"""

from __future__ import annotations

import contextlib
import importlib.util
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
from sana_export.commands import export_command
from sana_export.contract import GraphSpec
from sana_export.errors import ArtifactError, DependencyError, UsageError, first_line
from sana_export.formats.arrays import Array
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
from sana_export.runtime.backends.torch_weights import stored_graph

#: The repeated blocks of the large graphs and their methods that are compiled, once for all repetitions. That takes seconds;
#: compiling a whole graph takes minutes.
COMPILED: dict[type[nn.Module], tuple[str, ...]] = {
    Block: ("self_attention", "cross_attention", "feed_forward"),
    ResBlock: ("forward",),
    EfficientViTBlock: ("forward",),
    Upsample: ("forward",),
}
#: The environment variable that names the compiler of torch.compile on each device, and the compilers to look for if it is not set.
COMPILERS = {"cpu": ("CXX", ("g++", "clang++", "cl")), "cuda": ("CC", ("gcc", "clang", "cc", "cl"))}
#: PyTorch's settings that round float32 products, or sums of float16 products, to a lower precision.
_ROUNDING: tuple[tuple[Any, str], ...] = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (torch.backends.cudnn, "allow_tf32"),
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
#: How many shapes and kinds of block torch.compile compiles before it runs the others eager. All blocks of one class count
#: together, and PyTorch's own limit is 8, which batches, sizes, guidance, and PAG use up.
COMPILED_FORMS = 64


class TorchSession(EnqueuedSession):
    """One deployment graph on a device."""

    def __init__(
        self, spec: GraphSpec, module: nn.Module, device: str, threads: int | None = None, *, compiled: bool = False
    ) -> None:
        self.spec, self.module, self.device, self.threads = spec, module, device, threads
        self._limits = more_compiled_forms if compiled else contextlib.nullcontext
        self._has_run = False

    @property
    def capturable(self) -> bool:
        """True after the first run, which compiles and allocates."""
        return self._has_run

    def run(
        self, feeds: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor] | None = None
    ) -> dict[str, DeviceTensor]:
        inputs = {tensor.name: place(feeds[tensor.name], self.device) for tensor in self.spec.inputs}
        try:
            with torch.no_grad(), exact_products(), cpu_threads(self.threads), self._limits():
                results = self.module(**inputs)
        except RuntimeError as error:
            raise_out_of_memory(error, f"running {self.spec.name}", self.device)
            raise
        self._has_run = True
        found = dict(zip((tensor.name for tensor in self.spec.outputs), _tuple(results), strict=True))
        for name, target in (outputs or {}).items():
            found[name] = target.copy_(found[name])
        return found

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Write the weights in place, so captured work uses them too. Parameters have the names of the ONNX file's initializers."""
        targets = {name: self.module.get_parameter(name) for name in weights}
        with torch.no_grad():
            for name, values in weights.items():
                given = torch.from_numpy(np.array(values))
                targets[name].copy_(given.view(torch.bfloat16) if given.dtype == torch.uint16 else given)


class TorchTable(Sequence[Tensor]):
    """The rows of one tensor."""

    def __init__(self, whole: Tensor) -> None:
        #: The tensor with all rows.
        self.whole = whole
        self._rows = whole.unbind(0)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)


class TorchBackend(Backend):
    """The deployment graphs of a bundle's checkpoint in PyTorch, on the CPU. `compiled`: torch.compile compiles their blocks."""

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
            module = stored_graph(self.bundle, self.manifest, self.checkpoint, graph, self.torch_device)
        except RuntimeError as error:
            raise_out_of_memory(error, f"loading {graph}", self.device)
            raise
        if self.compiled:
            compile_blocks(module)
        return TorchSession(self.manifest.graphs[graph].spec, module, self.torch_device, self._threads, compiled=self.compiled)

    def to_device(self, array: Array) -> Tensor:
        return place(array, self.torch_device)

    def to_host(self, value: Tensor | Array) -> Array:
        return value if isinstance(value, np.ndarray) else value.cpu().numpy()

    def zeros(self, shape: Sequence[int], dtype: str | torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=_dtype(dtype), device=self.torch_device)


class CudaTorchBackend(TorchBackend, CapturingBackend):
    """The same on a GPU. Sessions only enqueue their work, and the sampling loop is captured as a CUDA graph."""

    device = "cuda"
    #: Prompts of similar length share compiled blocks and captured loops.
    text_multiple = 32
    #: Captured work keeps its own memory, so it never has to be captured again.
    generation = 0
    #: The memory that all captured work shares: a replay needs it only while it runs, and replays run one after another.
    _pool: Any = None
    #: What this backend captures on: PyTorch has one stream for all captures of a process, which may overlap.
    _capture_stream: Any = None

    def table(self, rows: int, shape: Sequence[int], dtype: str | torch.dtype) -> Sequence[Tensor]:
        return TorchTable(self.zeros((rows, *shape), dtype))

    def leading(self, value: Tensor, count: int) -> Tensor:
        return value[:count]

    def write(self, target: Tensor, value: Tensor | Array) -> None:
        target.copy_(place(value, "cpu") if isinstance(value, np.ndarray) else value)

    def write_table(self, target: Sequence[Tensor], rows: Array) -> None:
        assert isinstance(target, TorchTable)  # `table` made it
        target.whole.copy_(place(rows, "cpu").view(target.whole.shape))

    def copy(self, value: Tensor) -> Tensor:
        return value.clone()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool, self._capture_stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.torch_device)
        settings = {"pool": self._pool, "stream": self._capture_stream, "capture_error_mode": "thread_local"}
        failed: list[RuntimeError] = []

        def noted_work() -> None:
            try:
                work()
            except RuntimeError as error:
                failed.append(error)
                raise

        try:
            # thread_local: other threads may use the GPU meanwhile
            with torch.cuda.device(self.torch_device), torch.cuda.graph(graph, **settings):
                noted_work()
        except RuntimeError as error:
            first = failed[0] if failed else error  # ending a broken capture fails too, and that error says nothing
            raise_out_of_memory(first, "capturing the sampling loop", self.device)
            raise first from None
        return graph.replay

    def record_event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def open_torch(bundle: Path, manifest: Manifest, settings: BackendSettings = DEFAULT_SETTINGS, *, compiled: bool) -> TorchBackend:
    """The backend `torch`, or `torch-compile` if `compiled`; on the GPU if PyTorch finds one.

    Raises ArtifactError if the checkpoint that the bundle was made from is gone or changed, and DependencyError if torch.compile
    has no compiler.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if compiled:
        require_compiler(device)
    backend = CudaTorchBackend if device == "cuda" else TorchBackend
    return backend(bundle, manifest, reopen(bundle, manifest), settings, compiled=compiled)


def reopen(bundle: Path, manifest: Manifest) -> SanaCheckpoint:
    """Open the checkpoint in the manifest and check its hash."""
    recorded, fix = manifest.checkpoint, export_command(bundle, manifest)
    try:
        checkpoint = _open(recorded)
        found = checkpoint.sha256
    except (UsageError, ArtifactError, OSError) as error:
        raise ArtifactError(
            f"the torch backend needs the checkpoint that {bundle} was made from, but cannot open it",
            found=error.message if not isinstance(error, OSError) else error,
            wanted=f"{recorded.source} with hash {recorded.sha256[:16]}",
            fix=f"restore the checkpoint, or export from another one: {fix}",
        ) from error
    if found != recorded.sha256:
        raise ArtifactError(
            f"the checkpoint that {bundle} was made from has changed since then",
            found=f"{recorded.source} with hash {found[:16]}",
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
        vae=recorded.vae.path if recorded.vae else None,
        controlnet=recorded.controlnet.path if recorded.controlnet else None,
        loras=[Lora(Path(overlay.path), overlay.scale, overlay.layer_scales) for overlay in recorded.loras],
    )


def compile_blocks(module: nn.Module) -> None:
    """Compile the methods in `COMPILED` of all parts of `module`, at their first run."""
    for part in module.modules():
        for method in COMPILED.get(type(part), ()):
            setattr(part, method, torch.compile(getattr(part, method)))


def require_compiler(device: str) -> None:
    """Raise DependencyError if torch.compile cannot work on `device`."""
    variable, names = COMPILERS[device]
    missing = None
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        missing, wanted, fix = "no module triton", "Triton, which is part of PyTorch's CUDA builds for Linux", "pip install triton"
    elif not os.environ.get(variable) and not any(map(shutil.which, names)):
        missing, wanted, fix = f"none of {', '.join(names)}, and no {variable}", "a C++ compiler", "install g++ or set " + variable
    if missing is not None:
        raise DependencyError(
            f"the backend torch-compile needs a compiler for the {device}",
            found=missing,
            wanted=wanted,
            fix=f"{fix}, or --backend torch",
        )


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute products in the graph's own precision. PyTorch's settings are process-wide, so they are restored afterwards."""
    before = [getattr(owner, name) for owner, name in _ROUNDING]
    for owner, name in _ROUNDING:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for (owner, name), value in zip(_ROUNDING, before, strict=True):
            setattr(owner, name, value)


def more_compiled_forms() -> contextlib.AbstractContextManager[Any]:
    """PyTorch's limit is process-wide, so it is restored afterwards."""
    config: Any = torch.compiler.config
    patch: contextlib.AbstractContextManager[Any] = config.patch(recompile_limit=COMPILED_FORMS)
    return patch


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
    """Run with `count` threads on the CPU. PyTorch's setting is process-wide, so it is restored afterwards."""
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
    """`value` as a tensor on `device`. On the CPU it shares the memory of a writable, contiguous array."""
    if not isinstance(value, np.ndarray):
        return value
    array = np.ascontiguousarray(value)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).reshape(value.shape).to(device)


def raise_out_of_memory(error: RuntimeError, doing: str, device: str) -> None:
    """Raise DependencyError if `error` says that memory ran out."""
    text = first_line(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text.lower() for words in _OUT_OF_MEMORY):
        raise DependencyError(
            f"out of memory while {doing} with torch on the {device}",
            found=text,
            wanted="more free memory",
            fix="generate fewer or smaller images at once, or free memory",
        ) from error


def _dtype(name: str | torch.dtype) -> torch.dtype:
    return name if isinstance(name, torch.dtype) else getattr(torch, name)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
