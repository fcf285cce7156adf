"""ONNX Runtime: on its CUDA provider if onnxruntime-gpu is installed and there is a GPU, otherwise on the CPU.

`onnxruntime_rtx.py` is the same on another provider.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sana_export.commands import export_command, generate_command, repair_command
from sana_export.environment import NO_TELEMETRY, default_environment
from sana_export.errors import ArtifactError, DependencyError, UsageError, first_line
from sana_export.formats.arrays import Array
from sana_export.formats.dtypes import DTYPES
from sana_export.formats.linked_files import pass_linked_files
from sana_export.formats.onnx_weights import check_external_data
from sana_export.formats.quantized import DEQUANTIZED_ONCE, UNROUNDED_ACTIVATIONS
from sana_export.installation import install_command
from sana_export.known_files import check_known_files
from sana_export.machine import find_cuda_error
from sana_export.manifest import Manifest
from sana_export.quantization.choice import quantization_words
from sana_export.quantization.targets import NO_KERNELS, without_kernels
from sana_export.runtime.backends.base import DEFAULT_SETTINGS, Backend, BackendSettings, Session, check_options
from sana_export.runtime.backends.onnxruntime_graphs import PROVIDER_OPTIONS, GraphedSession
from sana_export.runtime.backends.onnxruntime_provider import (
    CUDA,
    DEVICES,
    INSTALL,
    BuiltInProvider,
    Provider,
    choose_provider,
    cuda_failures,
)

log = logging.getLogger(__name__)

_ERRORS_ONLY = 3
#: The name of each device's memory arena in the run option that shrinks it.
_ARENA = {"cpu": "cpu:0", "cuda": "gpu:{}"}
#: The scheme that comes nearest to those whose type it has no kernels for.
INSTEAD = "int4-weight"
#: The keys of `backend_options`.
OPTIONS = SESSION_OPTIONS, PROVIDER_OPTIONS_KEY = "session_options", "provider_options"
#: Graphs whose memory is freed after each run: they run once per image and need more memory than the graphs after them.
_FREED_AFTER_RUN = ("vae_decoder_head", "vae_encoder", "vae_encoder_head", "vae_encoder_tail")
#: Those of them that have no arena on a CPU. An arena keeps what a run frees in pieces that other tensors do not fit: 2 GB in the
#: decoder's head at 4096 px. Without it the system clears the memory of every large tensor, which takes time.
_WITHOUT_ARENA = ("vae_decoder_head",)
#: The graphs whose work is captured: they run in every step with the same shapes.
_CAPTURED = ("denoiser", "sampler")


class Place(NamedTuple):
    """Where tensors are stored."""

    #: "cpu" or "cuda".
    device: str
    #: The index of the GPU.
    number: int = 0


@dataclass(frozen=True, eq=False)
class Loaded:
    """A loaded graph."""

    #: The InferenceSession.
    session: Any
    #: The weights that were given to it. It may read their memory as long as it exists.
    weights: Sequence[Any] = ()


class OnnxRuntimeSession(Session):
    """One ONNX file in an InferenceSession. Tensors are OrtValues. On the CPU, arrays are fed and read without a copy."""

    def __init__(
        self, loaded: Loaded, graph: str, place: Place, run_options: Any, *, create: Callable[[Mapping[str, Array]], Loaded]
    ) -> None:
        """`create` loads the graph again with new values for some weights."""
        self._loaded, self._graph, self._place, self._run_options = loaded, graph, place, run_options
        self._outputs = [output.name for output in loaded.session.get_outputs()]
        self._create, self._weights = create, dict[str, Array]()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        binding = self._loaded.session.io_binding()
        # The arrays of the inputs must exist until the run is over.
        values = {name: _to_device(value, self._place) for name, value in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._place.device, self._place.number)
        with cuda_failures(f"running {self._graph}", self._place.device):
            self._loaded.session.run_with_iobinding(binding, self._run_options)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def refit(self, weights: Mapping[str, Array]) -> None:
        """ONNX Runtime cannot change weights after loading, so this loads the files again. Meanwhile both sessions exist."""
        replaced = {**self._weights, **weights}
        self._loaded = self._create(replaced)
        self._weights = replaced


#: On a CPU, fp16 products over an odd number of tokens round differently from the same products with a masked one more. With this
#: multiple, an image has the same bits beside a longer prompt as alone.
TEXT_MULTIPLE = 8


class OnnxRuntimeBackend(Backend):
    """Loads the ONNX graphs of a bundle.

    `cuda_graphs`: capture the two graphs of the sampling loop as CUDA graphs. `provider`: by default CUDA's if there is a GPU,
    otherwise the CPU's. Raises DependencyError if onnxruntime or CUDA is missing, UsageError for unknown options, ArtifactError for
    a precision that it cannot run.
    """

    name = "onnxruntime"
    text_multiple = TEXT_MULTIPLE

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        settings: BackendSettings = DEFAULT_SETTINGS,
        *,
        cuda_graphs: bool = False,
        provider: Provider | None = None,
    ) -> None:
        self._settings, self._cuda_graphs = settings, cuda_graphs
        if cuda_graphs:
            self.name = "onnxruntime-cuda-graphs"
            self.text_multiple = 32  # so that prompts of similar length have the shapes of the captured graph
        self.bundle, self.manifest = bundle, manifest
        self._fix = repair_command(bundle, manifest)
        self._onnxruntime = import_onnxruntime()
        self._check_options()
        self._provider = provider or BuiltInProvider(choose_provider(self._onnxruntime, settings.device), settings.device or 0)
        self.device = DEVICES[self._provider.name]
        self._check_device()
        self._check_precision()
        self._check_quantized()
        self.index = self._provider.number
        self._place = Place(self.device, self.index)

    def load(self, graph: str) -> Session:
        if self._cuda_graphs and graph in _CAPTURED and (session := self._load_captured(graph)) is not None:
            return session
        return self._load_plain(graph)

    def _load_captured(self, graph: str) -> GraphedSession | None:
        """A session that captures its work. None if ONNX Runtime cannot create it; the log says why."""
        path, options, _maps = self._checked(graph)
        try:
            session = self._open(graph, path, options, PROVIDER_OPTIONS)
        except DependencyError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common base
            log.warning("onnxruntime runs %s without a CUDA graph: %s", graph, first_line(error))
            return None
        spec = self.manifest.graphs[graph].spec
        return GraphedSession(self._onnxruntime, session, spec, self._place, lambda: self._load_plain(graph))

    def _load_plain(self, graph: str) -> OnnxRuntimeSession:
        loaded = self._create(graph, {})
        run_options = self._onnxruntime.RunOptions()
        if graph in _FREED_AFTER_RUN and not (self.device == "cpu" and graph in _WITHOUT_ARENA):
            run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", _ARENA[self.device].format(self._place.number))
        return OnnxRuntimeSession(loaded, graph, self._place, run_options, create=partial(self._create, graph))

    def _create(self, graph: str, weights: Mapping[str, Array]) -> Loaded:
        """Load `graph` with `weights` as the values of those initializers. Shares their memory."""
        path, options, maps = self._checked(graph)
        values = [_as_initializer(value) for value in weights.values()]
        if weights:  # add_initializer makes ONNX Runtime 1.32 compute wrong results if weights are in another file
            options.add_external_initializers(list(weights), values)
        try:
            session = self._open(graph, path, options)
        except DependencyError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise ArtifactError(
                f"onnxruntime {self._onnxruntime.__version__} cannot load {path}",
                found=first_line(error),
                wanted=f"a graph that its {self._provider.name} can run",
                fix=self._fix,
            ) from error
        del maps  # the session has copied them
        return Loaded(session, values)

    def _checked(self, graph: str) -> tuple[Path, Any, list[Any]]:
        """Check the graph's files against the manifest. Returns the ONNX file, its session's options, and what those refer to."""
        path, *data = check_known_files(self.bundle, self.manifest.graphs[graph].files, fix=self._fix)
        check_external_data(path, data, fix=self._fix)
        options = session_options(self._onnxruntime, self._settings.threads)
        options.enable_cpu_mem_arena = graph not in _WITHOUT_ARENA
        quantized = self.manifest.graphs[graph].quantized
        if self.device == "cpu" and quantized and not any(weight.inputs for weight in quantized):
            options.add_session_config_entry(*DEQUANTIZED_ONCE)
        maps = pass_linked_files(options, path.read_bytes(), path.parent, path.resolve().parent)
        for name, value in self._settings.options.get(SESSION_OPTIONS, {}).items():
            if "." in name:
                options.add_session_config_entry(name, str(value))
            else:
                setattr(options, name, value)
        return path, options, maps

    def _open(self, graph: str, path: Path, options: Any, extra: Mapping[str, str] | None = None) -> Any:
        """A session of the ONNX file `path` on the provider, with `extra` among the provider's options."""
        given = self._settings.options.get(PROVIDER_OPTIONS_KEY, {})
        provider_options = {**{name: str(value) for name, value in given.items()}, **(extra or {})}
        return self._provider.session(self._onnxruntime, self.manifest.graphs[graph], path, options, provider_options)

    def _check_options(self) -> None:
        """Raise UsageError for options that ONNX Runtime does not have."""
        for name in OPTIONS:
            check_options(name, self._settings.options.get(name, {}))
        unknown = [name for name in self._settings.options if name not in OPTIONS]
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

    def _check_device(self) -> None:
        """Raise DependencyError if a GPU is needed and this ONNX Runtime would run on the CPU."""
        if self.device == "cuda" or not (self._cuda_graphs or self._settings.device is not None):
            return
        what = f"GPU {self._settings.device}" if self._settings.device is not None else f"the backend {self.name}"
        available = self._onnxruntime.get_available_providers()
        no_gpu = find_cuda_error() or "no NVIDIA GPU and driver"
        raise DependencyError(
            f"{what} was asked for, but onnxruntime runs on the CPU here",
            found=no_gpu if CUDA in available else f"an ONNX Runtime with {', '.join(available)}",
            wanted="onnxruntime-gpu with its CUDA libraries and an NVIDIA GPU",
            fix=f"{INSTALL}, or --backend onnxruntime without --device",
        )

    def _check_precision(self) -> None:
        precision = self.manifest.options.precision
        if precision not in self._provider.precisions:
            raise ArtifactError(
                f"{self.bundle} cannot run on onnxruntime's {self._provider.name}",
                found=f"a bundle in {precision}",
                wanted=" or ".join(self._provider.precisions),
                fix=export_command(self.bundle, self.manifest, precision="fp32"),
            )

    def _check_quantized(self) -> None:
        """Raise ArtifactError if parts of the bundle are quantized to a type that ONNX Runtime has no kernels for."""
        schemes = self.manifest.options.quantize
        if missing := without_kernels(schemes):
            others = export_command(self.bundle, self.manifest, quantize={**schemes, **dict.fromkeys(missing, INSTEAD)})
            raise ArtifactError(
                f"{self.bundle} cannot run on {self.name}, which has no kernels for {NO_KERNELS}",
                found=quantization_words(missing),
                wanted="another scheme, or another backend: TensorRT's engines, or torch, which computes with the same numbers",
                fix=f"{generate_command(self.bundle, 'torch')}, or {others}",
            )


def import_onnxruntime() -> Any:
    """The module. Raises DependencyError if it is not installed."""
    try:
        with default_environment(NO_TELEMETRY):  # it reads this once, when it is imported
            import onnxruntime
    except ImportError as error:
        raise DependencyError(
            "the backend onnxruntime is not installed",
            found=error,
            wanted="onnxruntime, or onnxruntime-gpu with an NVIDIA GPU",
            fix=install_command("cpu"),
        ) from error
    return onnxruntime


def session_options(onnxruntime: Any, threads: int | None = None) -> Any:
    """The options of a session. `onnxruntime` is the module. If `threads` is None, it chooses the number of threads itself."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    # With planned reuse, a buffer is kept until the last tensor that will use it, and most buffers of one block wait for the next
    # block: twice the memory, and no faster.
    options.enable_mem_reuse = False
    # Each session has its own threads. By default they wait for work in a busy loop and take cores from the next graph's threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(*UNROUNDED_ACTIVATIONS)
    return options


def _to_device(value: Any, place: Place) -> Any:
    """An OrtValue at `place`. An array is converted and kept alive; an OrtValue is returned as it is."""
    if not isinstance(value, np.ndarray):
        return value
    import onnxruntime

    with cuda_failures("copying to the device", place.device):
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), place.device, place.number)


def _as_initializer(values: Array) -> Any:
    """An OrtValue on the CPU that shares the memory of `values`. uint16 means bfloat16."""
    import onnxruntime

    if values.dtype == np.uint16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, DTYPES["bfloat16"].onnx)
    return onnxruntime.OrtValue.ortvalue_from_numpy(values)
