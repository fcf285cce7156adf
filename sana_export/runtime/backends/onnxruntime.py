"""ONNX Runtime: on its CUDA provider where onnxruntime-gpu is installed and a GPU answers, else on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.commands import export_line
from sana_export.errors import ArtifactError, DependencyError
from sana_export.formats.onnx_weights import check_external_data
from sana_export.manifest import Manifest, check_files
from sana_export.runtime.backends import Array, Backend, Session
from sana_export.runtime.backends.onnxruntime_graphs import PROVIDER_OPTIONS, GraphedSession

log = logging.getLogger(__name__)

#: Provider: the device that its tensors live on. The first one that is available is used.
DEVICES = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}
#: Precisions that a device has no kernels for.
MISSING_PRECISIONS = {"cpu": ("bf16",), "cuda": ()}

_ERRORS_ONLY = 3
#: TensorProto.BFLOAT16, which numpy does not have.
_BFLOAT16 = 16
#: What an arena that gives back what a run took is called for each device, in a setting of a run.
_ARENAS = {"cpu": "cpu:0", "cuda": "gpu:0"}
#: Graphs that run once an image and need more memory than what runs after them: theirs is given back.
_GIVING_BACK = ("vae_decoder_head",)
#: float32 is exact: left to itself the CUDA provider rounds the factors of its products to TF32.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
#: Graphs whose work can be captured: they run every step, at the same shapes.
_CAPTURED = ("denoiser", "sampler")
#: What ONNX Runtime, CUDA, cuBLAS and cuDNN say when memory runs out, in lower case.
_OUT_OF_MEMORY = ("failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "_alloc_failed")


class OnnxRuntimeSession:
    """One ONNX file in an InferenceSession. Tensors are OrtValues; on the CPU arrays are fed and read without a copy."""

    def __init__(
        self, session: Any, graph: str, device: str, run_options: Any = None, *, create: Callable[[Mapping[str, Any]], Any]
    ) -> None:
        self._session, self._graph, self._device, self._run_options = session, graph, device, run_options
        self._outputs = [output.name for output in session.get_outputs()]
        self._create, self._weights = create, dict[str, Array]()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        binding = self._session.io_binding()
        # The arrays behind the inputs have to live until the run is over.
        values = {name: _to_device(value, self._device) for name, value in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # ONNX Runtime's errors have no common base; all but one kind are raised again
            _raise_out_of_memory(error, f"running {self._graph}", self._device)
            raise
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def refit(self, weights: Mapping[str, Array]) -> None:
        """ONNX Runtime fixes weights when it loads a graph: another session of the same files takes this one's place, and until it
        is there both are held."""
        replaced = {**self._weights, **weights}
        self._session = self._create(replaced)
        self._weights = replaced


class OnnxRuntimeBackend(Backend):
    """Loads the ONNX graphs of a bundle. Raises DependencyError without onnxruntime, ArtifactError where it lacks the precision.

    `cuda_graphs`: on a GPU, the two graphs of the sampling loop are captured as CUDA graphs.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Path, manifest: Manifest, *, cuda_graphs: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DependencyError(
                "the backend onnxruntime is not installed",
                found=error,
                wanted="onnxruntime, or onnxruntime-gpu with an NVIDIA GPU",
                fix='pip install "sana-export[cpu]"',
            ) from error
        self.bundle, self.manifest = bundle, manifest
        self._fix = export_line(bundle, manifest)
        self._onnxruntime = onnxruntime
        self._use(next(name for name in DEVICES if name in onnxruntime.get_available_providers()))
        self._cuda_graphs = cuda_graphs and self.device == "cuda"
        if cuda_graphs:
            self.name = "onnxruntime-cuda-graphs"
            self.text_multiple = 32 if self._cuda_graphs else 1  # so that prompts of about one length share what is captured
        if cuda_graphs and not self._cuda_graphs:
            log.warning("onnxruntime captures no CUDA graphs here: it runs on the %s", self.device)

    def load(self, graph: str) -> Session:
        if self._cuda_graphs and graph in _CAPTURED and (session := self._load_captured(graph)) is not None:
            return session
        return self._load_plain(graph)

    def _load_captured(self, graph: str) -> GraphedSession | None:
        """A session that captures its work; None where ONNX Runtime makes none, for the reason in the log."""
        path, options = self._checked(graph)
        providers = [(self._provider, {**_PROVIDER_OPTIONS[self.device], **PROVIDER_OPTIONS}), "CPUExecutionProvider"]
        try:
            session = self._onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors have no common base
            _raise_out_of_memory(error, f"loading {graph}", self.device)
            log.warning("onnxruntime runs %s without a CUDA graph: %s", graph, _first_line(error))
            return None
        spec = self.manifest.graphs[graph].spec
        return GraphedSession(self._onnxruntime, session, spec, self.device, lambda: self._load_plain(graph))

    def _load_plain(self, graph: str) -> OnnxRuntimeSession:
        session = self._create(graph, {})
        run_options = self._onnxruntime.RunOptions()
        if graph in _GIVING_BACK:
            run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", _ARENAS[self.device])
        return OnnxRuntimeSession(session, graph, self.device, run_options, create=partial(self._create, graph))

    def _create(self, graph: str, weights: Mapping[str, Array]) -> Any:
        """An InferenceSession of `graph`, whose initializers named in `weights` have these values; their memory is shared."""
        path, options = self._checked(graph)
        values = [_as_initializer(value) for value in weights.values()]
        if weights:  # not by add_initializer: with weights in another file ONNX Runtime 1.32 then computes something else
            options.add_external_initializers(list(weights), values)
        providers: list[Any] = [(self._provider, _PROVIDER_OPTIONS[self.device])]
        if self.device == "cuda":
            providers.append("CPUExecutionProvider")
        try:
            session = self._onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors have no common base
            _raise_out_of_memory(error, f"loading {graph}", self.device)
            raise ArtifactError(
                f"onnxruntime {self._onnxruntime.__version__} cannot load {path}",
                found=_first_line(error),
                wanted=f"a graph that its {self._provider} can run",
                fix=self._fix,
            ) from error
        if (active := session.get_providers()[0]) != self._provider:
            log.warning("onnxruntime's %s did not start: %s runs on %s", self._provider, graph, active)
            self._use(active)
        session.held_weights = values  # ONNX Runtime may read them as long as this session lives
        return session

    def _checked(self, graph: str) -> tuple[Path, Any]:
        """The graph's file once it and its weights are as recorded, and the options of a session of it."""
        path, *data = check_files(self.bundle, self.manifest.graphs[graph].files, fix=self._fix)
        check_external_data(path, data, fix=self._fix)
        return path, session_options(self._onnxruntime)

    def to_device(self, array: Array) -> Any:
        return _to_device(array, self.device)

    def to_host(self, value: Any) -> Array:
        return value if isinstance(value, np.ndarray) else value.numpy()

    def _use(self, provider: str) -> None:
        self._provider, self.device = provider, DEVICES[provider]
        precision, missing = self.manifest.options.precision, MISSING_PRECISIONS[self.device]
        if precision in missing:
            raise ArtifactError(
                f"{self.bundle} cannot run on onnxruntime's {provider}",
                found=f"a bundle in {precision}",
                wanted=" or ".join(name for name in ("fp32", "fp16", "bf16") if name not in missing),
                fix=export_line(self.bundle, self.manifest, precision="fp32"),
            )


def session_options(onnxruntime: Any) -> Any:
    """New options of a session of a bundle's graph. `onnxruntime` is the module."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # Planned reuse keeps a buffer until the last tensor that will ever use it, and most of one block's wait for the next block:
    # twice the memory, and no faster.
    options.enable_mem_reuse = False
    # Every session has threads of its own, which wait for more work in a busy loop while the next graph's need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _to_device(value: Any, device: str) -> Any:
    """An OrtValue on `device`: of an array (which it keeps alive), or `value` itself."""
    if not isinstance(value, np.ndarray):
        return value
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), device, 0)


def _as_initializer(values: Array) -> Any:
    """The OrtValue of weights, on the CPU and over their memory; uint16 stands for bfloat16."""
    import onnxruntime

    if values.dtype == np.uint16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(values)


def _raise_out_of_memory(error: Exception, doing: str, device: str) -> None:
    """Raise DependencyError if that is what `error` means."""
    if not isinstance(error, MemoryError) and not any(text in str(error).lower() for text in _OUT_OF_MEMORY):
        return None
    raise DependencyError(
        f"out of memory while {doing} with onnxruntime on the {device}",
        found=_first_line(error),
        wanted="more free memory",
        fix="ask for fewer images at once or a smaller size, or free memory",
    ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
