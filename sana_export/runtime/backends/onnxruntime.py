"""ONNX Runtime: on its CUDA provider where onnxruntime-gpu is installed and a GPU answers, else on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sana_export.commands import export_line
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.files import check_files
from sana_export.formats.arrays import Array
from sana_export.formats.onnx_weights import check_external_data
from sana_export.manifest import Manifest
from sana_export.runtime.backends.base import DEFAULT_SETTINGS, Backend, BackendSettings, Session
from sana_export.runtime.backends.onnxruntime_graphs import PROVIDER_OPTIONS, GraphedSession

log = logging.getLogger(__name__)

#: Provider: the device that its tensors live on. The first one that is available is used.
DEVICES = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}
#: Precisions that a device has no kernels for.
MISSING_PRECISIONS = {"cpu": ("bf16",), "cuda": ()}

_ERRORS_ONLY = 3
#: TensorProto.BFLOAT16, which numpy does not have.
_BFLOAT16 = 16
#: The name of each device's memory arena in the setting of a run that shrinks it afterwards.
_ARENA = {"cpu": "cpu:0", "cuda": "gpu:{}"}
#: The keys of `backend_options`.
SESSION_OPTIONS, PROVIDER_OPTIONS_KEY = "session_options", "provider_options"
#: Graphs that run once an image and need more memory than what runs after them: theirs is given back.
_GIVING_BACK = ("vae_decoder_head",)
#: float32 is exact: left to itself the CUDA provider rounds the factors of its products to TF32.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
#: Graphs whose work can be captured: they run every step, at the same shapes.
_CAPTURED = ("denoiser", "sampler")
#: What ONNX Runtime, CUDA, cuBLAS and cuDNN say when memory runs out, in lower case.
_OUT_OF_MEMORY = ("failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "_alloc_failed")


class Place(NamedTuple):
    """Where tensors live: "cpu" or "cuda", and the index of the GPU."""

    device: str
    number: int = 0


@dataclass(frozen=True, eq=False)
class Loaded:
    """An InferenceSession and the weights given to it, whose memory it may read as long as it lives."""

    session: Any
    weights: Sequence[Any] = ()


class OnnxRuntimeSession(Session):
    """One ONNX file in an InferenceSession. Tensors are OrtValues; on the CPU arrays are fed and read without a copy."""

    def __init__(
        self, loaded: Loaded, graph: str, place: Place, run_options: Any, *, create: Callable[[Mapping[str, Array]], Loaded]
    ) -> None:
        """`create` loads the graph again with other weights."""
        self._loaded, self._graph, self._place, self._run_options = loaded, graph, place, run_options
        self._outputs = [output.name for output in loaded.session.get_outputs()]
        self._create, self._weights = create, dict[str, Array]()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        binding = self._loaded.session.io_binding()
        # The arrays behind the inputs have to live until the run is over.
        values = {name: _to_device(value, self._place) for name, value in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._place.device, self._place.number)
        try:
            self._loaded.session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # ONNX Runtime's errors have no common base; all but one kind are raised again
            _raise_out_of_memory(error, f"running {self._graph}", self._place.device)
            raise
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def refit(self, weights: Mapping[str, Array]) -> None:
        """ONNX Runtime fixes weights when it loads a graph: another session of the same files takes this one's place, and until it
        is there both are held."""
        replaced = {**self._weights, **weights}
        self._loaded = self._create(replaced)
        self._weights = replaced


class OnnxRuntimeBackend(Backend):
    """Loads the ONNX graphs of a bundle. Raises DependencyError without onnxruntime, ArtifactError where it lacks the precision.

    `cuda_graphs`: on a GPU, the two graphs of the sampling loop are captured as CUDA graphs.
    """

    name = "onnxruntime"

    def __init__(
        self, bundle: Path, manifest: Manifest, settings: BackendSettings = DEFAULT_SETTINGS, *, cuda_graphs: bool = False
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DependencyError(
                "the backend onnxruntime is not installed",
                found=error,
                wanted="onnxruntime, or onnxruntime-gpu with an NVIDIA GPU",
                fix='pip install "sana-export[cpu]"',
            ) from error
        if cuda_graphs:
            self.name = "onnxruntime-cuda-graphs"
        self._settings = settings
        self.bundle, self.manifest = bundle, manifest
        self._fix = export_line(bundle, manifest)
        self._onnxruntime = onnxruntime
        self._check_options()
        self._use(next(name for name in DEVICES if name in onnxruntime.get_available_providers()))
        self._cuda_graphs = cuda_graphs and self.device == "cuda"
        if self._cuda_graphs:
            self.text_multiple = 32  # so that prompts of about one length share what is captured
        if cuda_graphs and not self._cuda_graphs:
            log.warning("onnxruntime captures no CUDA graphs here: it runs on the %s", self.device)

    def load(self, graph: str) -> Session:
        if self._cuda_graphs and graph in _CAPTURED and (session := self._load_captured(graph)) is not None:
            return session
        return self._load_plain(graph)

    def _load_captured(self, graph: str) -> GraphedSession | None:
        """A session that captures its work; None where ONNX Runtime makes none, for the reason in the log."""
        path, options = self._checked(graph)
        providers = [(self._provider, {**self._provider_options(), **PROVIDER_OPTIONS}), "CPUExecutionProvider"]
        try:
            session = self._onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors have no common base
            _raise_out_of_memory(error, f"loading {graph}", self.device)
            log.warning("onnxruntime runs %s without a CUDA graph: %s", graph, _first_line(error))
            return None
        spec = self.manifest.graphs[graph].spec
        return GraphedSession(self._onnxruntime, session, spec, self._place, lambda: self._load_plain(graph))

    def _load_plain(self, graph: str) -> OnnxRuntimeSession:
        loaded = self._create(graph, {})
        run_options = self._onnxruntime.RunOptions()
        if graph in _GIVING_BACK:
            run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", _ARENA[self.device].format(self._place.number))
        return OnnxRuntimeSession(loaded, graph, self._place, run_options, create=partial(self._create, graph))

    def _create(self, graph: str, weights: Mapping[str, Array]) -> Loaded:
        """Load `graph` with these values for the initializers named in `weights`; their memory is shared."""
        path, options = self._checked(graph)
        values = [_as_initializer(value) for value in weights.values()]
        if weights:  # not by add_initializer: with weights in another file ONNX Runtime 1.32 then computes something else
            options.add_external_initializers(list(weights), values)
        providers: list[Any] = [(self._provider, self._provider_options())]
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
        return Loaded(session, values)

    def _checked(self, graph: str) -> tuple[Path, Any]:
        """The graph's file once it and its weights are as recorded, and the options of a session of it."""
        path, *data = check_files(self.bundle, self.manifest.graphs[graph].files, fix=self._fix)
        check_external_data(path, data, fix=self._fix)
        options = session_options(self._onnxruntime, self._settings.threads)
        for name, value in self._settings.options.get(SESSION_OPTIONS, {}).items():
            if "." in name:
                options.add_session_config_entry(name, str(value))
            else:
                setattr(options, name, value)
        return path, options

    def _provider_options(self) -> dict[str, str]:
        index = {"device_id": str(self._place.number)} if self.device == "cuda" else {}
        given = self._settings.options.get(PROVIDER_OPTIONS_KEY, {})
        return {**_PROVIDER_OPTIONS[self.device], **index, **{name: str(value) for name, value in given.items()}}

    def _check_options(self) -> None:
        """Raise UsageError for options that ONNX Runtime does not have."""
        known = (SESSION_OPTIONS, PROVIDER_OPTIONS_KEY)
        unknown = [name for name in self._settings.options if name not in known]
        attributes = vars(self._onnxruntime.SessionOptions)
        given = self._settings.options.get(SESSION_OPTIONS, {})
        unknown += [f"{SESSION_OPTIONS}.{name}" for name in given if "." not in name and name not in attributes]
        if unknown:
            raise UsageError(
                f"unknown backend_options of {self.name}",
                found=", ".join(unknown),
                wanted=f"{SESSION_OPTIONS} (attributes of onnxruntime.SessionOptions, or configuration entries with a dot in their"
                f" name) and {PROVIDER_OPTIONS_KEY}",
            )

    def to_device(self, array: Array) -> Any:
        return _to_device(array, self._place)

    def to_host(self, value: Any) -> Array:
        return value if isinstance(value, np.ndarray) else value.numpy()

    def _use(self, provider: str) -> None:
        self._provider, self.device = provider, DEVICES[provider]
        if self.device == "cpu" and self._settings.device is not None:
            raise UsageError(
                f"GPU {self._settings.device} was asked for, but onnxruntime runs on the CPU here",
                found=f"the providers {', '.join(self._onnxruntime.get_available_providers())}",
                wanted="onnxruntime-gpu with its CUDA libraries and an NVIDIA GPU, or no device",
                fix='pip install "sana-export[cuda]", or leave out device (--device)',
            )
        self._place = Place(self.device, self._settings.device or 0)
        precision, missing = self.manifest.options.precision, MISSING_PRECISIONS[self.device]
        if precision in missing:
            raise ArtifactError(
                f"{self.bundle} cannot run on onnxruntime's {provider}",
                found=f"a bundle in {precision}",
                wanted=" or ".join(name for name in ("fp32", "fp16", "bf16") if name not in missing),
                fix=export_line(self.bundle, self.manifest, precision="fp32"),
            )


def session_options(onnxruntime: Any, threads: int | None = None) -> Any:
    """Options of a session of a bundle's graph. `onnxruntime` is the module, `threads` None leaves their number to it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    # Planned reuse keeps a buffer until the last tensor that will ever use it, and most of one block's wait for the next block:
    # twice the memory, and no faster.
    options.enable_mem_reuse = False
    # Every session has threads of its own, which wait for more work in a busy loop while the next graph's need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _to_device(value: Any, place: Place) -> Any:
    """An OrtValue at `place`: of an array (which it keeps alive), or `value` itself."""
    if not isinstance(value, np.ndarray):
        return value
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), place.device, place.number)


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
