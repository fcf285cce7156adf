"""Builds one ONNX graph into one serialized engine, with either flavour of TensorRT.

The network is strongly typed: the precision of every tensor is the graph's own. `build_engine` runs in the calling thread, which
the builder blocks for seconds to minutes without handling signals. `worker.build_in_child` runs it in a child process, which
Ctrl-C can end at once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.contract import GraphSpec, TensorSpec
from sana_export.errors import ArtifactError, Cancelled, DependencyError, SanaExportError
from sana_export.files import read_unlisted, write_whole
from sana_export.formats.dtypes import DTYPES
from sana_export.formats.onnx_weights import copies_of_shared, external_tensors
from sana_export.profiles import Range
from sana_export.progress import OnProgress
from sana_export.trt.engine_file import EngineFile
from sana_export.trt.flavour import network_flags, set_compute_capabilities
from sana_export.trt.logger import CollectedLog, logger_for, readable
from sana_export.trt.options import BUILDER_FLAGS, DEFAULT_OPTIONS, FLAGS, PREVIEW_FEATURES, BuildOptions
from sana_export.trt.progress import progress_monitor

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A finished engine file."""

    #: The hash of the file, in hex.
    sha256: str
    #: Its size.
    bytes: int
    #: Time from parsing the graph to the last byte.
    seconds: float
    #: GPU memory that a run needs for activations at the largest shapes, as the builder reports it. 0 if it is not known.
    activation_bytes: int = 0
    #: Peak host memory of a process that only built this engine. 0 if it is not known.
    peak_bytes: int = 0
    #: The builder's list of the engine's layers, for `layers.parse_layers`. Empty unless it was asked for.
    layers: str = ""


def build_engine(
    module: Any,
    onnx: Path,
    destination: Path,
    spec: GraphSpec,
    ranges: Mapping[str, Range],
    *,
    compute_capabilities: tuple[str, ...] = (),
    options: BuildOptions = DEFAULT_OPTIONS,
    timing_cache: Path | None = None,
    export: str | None = None,
    list_layers: bool = False,
    on_progress: OnProgress | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Built:
    """Build an engine of the graph in the file `onnx` for `ranges` and write it to `destination`.

    `module` is `tensorrt` or `tensorrt_rtx`. The external data of the graph is in the same folder. `export` is the command that
    exports the bundle again, for errors. With `list_layers` the builder lists the layers, in the result and in the engine. The file
    gets its name when it is complete. `cancelled` is called at every step of the builder. An exception of `on_progress` ends the
    build and is raised from here. Raises ArtifactError if the graph cannot be parsed or compiled or is not `spec`, DependencyError
    if the GPU, memory or disk space is missing, and Cancelled.
    """
    started = time.monotonic()
    with logger_for(module).collect() as log:
        builder = _create_builder(module, log)
        network = builder.create_network(network_flags(module))
        copies = copies_of_shared(onnx) if options.refittable and onnx.is_file() else {}
        parser = _parse(module, network, log, onnx, copies, export)
        _check_tensors(module, network, spec, onnx, export)
        if options.refittable:
            _mark_weights(network, onnx)
        config = configure(module, builder, spec, ranges, options, compute_capabilities)
        if list_layers:
            config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        if timing_cache is not None:
            _load_timing_cache(config, timing_cache)
        monitor = progress_monitor(module, spec.name, on_progress, cancelled)
        config.progress_monitor = monitor
        with EngineFile(destination, cancelled) as file:
            finished = _serialize(module, builder, network, config, file)
            del parser, copies  # they own the memory of the weights, which the builder reads until here
            if monitor.raised is not None:
                raise monitor.raised
            if cancelled():
                raise Cancelled(f"the build of {spec.name} was cancelled")
            if not finished and not file.refused:
                raise _build_error(module, spec.name, log.errors, onnx, export)
            file.keep()
        for line in log.errors:
            LOG.warning("%s: %s", spec.name, line)
        if timing_cache is not None:
            _save_timing_cache(config, timing_cache)
        return Built(file.sha256, file.bytes, time.monotonic() - started, log.activation_bytes, layers=log.layers)


def input_shapes(spec: GraphSpec, ranges: Mapping[str, Range]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The min, opt and max shape of every input of `spec` that has a dynamic axis, by name."""
    return {
        tensor.name: tuple(
            tuple(axis if isinstance(axis, int) else ranges[axis][which] for axis in tensor.shape) for which in range(3)
        )
        for tensor in spec.inputs
        if any(isinstance(axis, str) for axis in tensor.shape)
    }


def _create_builder(module: Any, log: CollectedLog) -> Any:
    try:
        return module.Builder(logger_for(module))
    except TypeError as error:  # the binding raises this if the library returns no builder
        raise DependencyError(
            f"{module.__name__} {module.__version__} cannot build on this machine",
            found="; ".join(log.errors) or str(error),
            wanted="an NVIDIA GPU and its driver",
            fix="sana-export doctor",
        ) from error


def _parse(module: Any, network: Any, log: CollectedLog, onnx: Path, copies: Mapping[str, Any], export: str | None) -> Any:
    """Fill `network` from the file, with the weights in `copies` taken from there. Returns the parser, which owns the others."""
    parser = module.OnnxParser(network, logger_for(module))
    if _read(parser, onnx, copies):
        return parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [_describe(error) for error in errors]
    # The log has details of some errors, such as the name of a missing file, and repeats the others in other words.
    reasons = [readable(error.desc()) for error in errors]
    lines = [line for line in log.errors if not line.startswith("While parsing node")]
    found += [line for line in lines if not any(reason in line or line in reason for reason in reasons)]
    raise ArtifactError(
        f"{module.__name__} {module.__version__} cannot read {onnx}",
        found="; ".join(found),
        wanted="an ONNX graph that it supports",
        fix=export,
    )


def _read(parser: Any, onnx: Path, copies: Mapping[str, Any]) -> bool:
    if not copies:
        return bool(parser.parse_from_file(str(onnx)))
    model_loaded = parser.load_model_proto(onnx.read_bytes(), str(onnx))
    loaded = model_loaded and all(parser.load_initializer(name, data.ctypes.data, data.nbytes) for name, data in copies.items())
    return bool(loaded and parser.parse_model_proto())


def _mark_weights(network: Any, onnx: Path) -> None:
    names = [tensor.name for tensor in external_tensors(onnx.read_bytes())]
    if unmarked := [name for name in names if not network.mark_weights_refittable(name)]:
        raise ArtifactError(
            f"no refittable engine can be built from {onnx}",
            found=f"weights that the compiler cannot find by name: {', '.join(unmarked)}",
            wanted="a graph that uses every external weight as it is stored",
            fix="leave out --refittable",
        )


def _describe(error: Any) -> str:
    where = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return where + readable(error.desc()).replace("\n", ": ")


def _check_tensors(module: Any, network: Any, spec: GraphSpec, onnx: Path, export: str | None) -> None:
    # A version may lack a dtype.
    names = {getattr(module.DataType, dtype.tensorrt, None): dtype.name for dtype in DTYPES.values()}

    def found(tensor: Any) -> TensorSpec:
        shape = tuple("?" if length < 0 else length for length in tensor.shape)
        return TensorSpec(tensor.name, names.get(tensor.dtype, str(tensor.dtype)), shape)

    def anonymous(tensor: TensorSpec) -> TensorSpec:
        return TensorSpec(tensor.name, tensor.dtype, tuple("?" if isinstance(axis, str) else axis for axis in tensor.shape))

    inputs = {found(network.get_input(index)) for index in range(network.num_inputs)}
    outputs = {found(network.get_output(index)) for index in range(network.num_outputs)}
    for kind, actual, listed in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
        wanted = {anonymous(tensor) for tensor in listed}
        if actual != wanted:
            raise ArtifactError(
                f"{onnx} is not the graph {spec.name!r} that the manifest describes: its {kind} differ",
                found=", ".join(sorted(map(_tensor_text, actual - wanted))) or "no others",
                wanted=", ".join(sorted(map(_tensor_text, wanted - actual))) or "no others",
                fix=export,
            )


def _tensor_text(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def configure(
    module: Any,
    builder: Any,
    spec: GraphSpec,
    ranges: Mapping[str, Range],
    options: BuildOptions,
    compute_capabilities: tuple[str, ...],
) -> Any:
    """The builder's configuration: target GPUs, flags, precision rules and one optimization profile for `ranges`.

    Raises ValueError if a range is not in the order min, opt, max.
    """
    config = builder.create_builder_config()
    set_compute_capabilities(module, config, compute_capabilities)
    for flag in FLAGS if not options.weight_streaming else ():
        if hasattr(module.BuilderFlag, flag):
            config.set_flag(getattr(module.BuilderFlag, flag))
    for feature in PREVIEW_FEATURES:
        if hasattr(module.PreviewFeature, feature):
            config.set_preview_feature(getattr(module.PreviewFeature, feature), True)
    if not options.tf32:
        config.clear_flag(module.BuilderFlag.TF32)
    for option, flags in BUILDER_FLAGS.items():
        for flag in flags if getattr(options, option) else ():
            config.set_flag(getattr(module.BuilderFlag, flag))
    if options.hardware_compatible:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    if shapes := input_shapes(spec, ranges):
        profile = builder.create_optimization_profile()
        for name, (smallest, typical, largest) in shapes.items():
            profile.set_shape(name, smallest, typical, largest)
        with logger_for(module).collect() as log:
            if config.add_optimization_profile(profile) < 0:
                raise ValueError(f"{spec.name}: not min <= opt <= max in {shapes}: {'; '.join(log.errors)}")
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(read_unlisted(path) or b"")
    config.set_timing_cache(cache, False)


def _save_timing_cache(config: Any, path: Path) -> None:
    write_whole(path, memoryview(config.get_timing_cache().serialize()))


def _serialize(module: Any, builder: Any, network: Any, config: Any, file: EngineFile) -> bool:
    """Compile the network and write the engine to `file`, in chunks: memory never holds all of it. Returns whether both worked."""

    class Writer(module.IStreamWriter):
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes, *_size: int) -> int:
            return file.write(data)

    return bool(builder.build_serialized_network_to_stream(network, config, Writer()))


#: What the compiler's messages mean for the user: a pattern, the type of the error, and its fix. The first match counts.
_BUILD_ERRORS: tuple[tuple[str, type[SanaExportError], str], ...] = (
    ("out ?of ?memory", DependencyError, "use a profile with smaller images or batches, for example --profile laptop"),
    (
        r"Unable to load library: \S*lean",
        DependencyError,
        "leave out --version-compatible (this installation lacks the lean runtime), or build with the full TensorRT",
    ),
    ("CUDA_SUCCESS", DependencyError, "build it on a machine with an NVIDIA GPU and driver, or leave out --refittable"),
    (r"\bSM\d+\b", ArtifactError, "leave that GPU out of --compute-capability, or export with --dtype fp16"),
)


def _build_error(module: Any, graph: str, lines: list[str], onnx: Path, export: str | None) -> SanaExportError:
    """The error for what the compiler said. If no pattern matches, the graph may be at fault: `export` makes it again."""
    found = "; ".join(lines) or "no reason given"
    rows = ((error, fix) for pattern, error, fix in _BUILD_ERRORS if re.search(pattern, found, re.IGNORECASE))
    error, fix = next(rows, (ArtifactError, export))
    return error(f"{module.__name__} {module.__version__} cannot compile {graph} ({onnx})", found=found, fix=fix)
