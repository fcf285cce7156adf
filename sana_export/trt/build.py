"""One ONNX graph to one serialized engine, with either flavour of TensorRT.

The network is strongly typed: every precision is the graph's own. `build_engine` works in the calling thread, which
the builder holds for seconds to minutes without looking at signals; `worker.build_in_child` runs it where Ctrl-C can
end it at once.
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
from sana_export.errors import ArtifactError, DependencyError, SanaExportError
from sana_export.files import disk_errors, partial_path
from sana_export.formats.onnx_weights import copies_of_shared, external_tensors
from sana_export.profiles import Range
from sana_export.trt.engine_file import EngineFile
from sana_export.trt.flavour import network_flags, set_compute_capabilities
from sana_export.trt.logger import logger_for, readable
from sana_export.trt.options import BUILDER_FLAGS, DEFAULT_OPTIONS, BuildOptions
from sana_export.trt.progress import OnProgress, progress_monitor

LOG = logging.getLogger(__name__)

#: TensorRT's tensor types, by the contract's names.
DATA_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "uint8": "UINT8",
    "bool": "BOOL",
}


class Cancelled(SanaExportError):
    """The caller asked the build to stop; nothing was written."""

    exit_code = 130


@dataclass(frozen=True)
class Built:
    """A finished engine file: sha256 in hex, size in bytes, seconds from parsing to the last byte.

    `activation_bytes`: GPU memory that a run works in at the largest shapes, as the builder says. `peak_bytes`: host memory of the
    process that built it alone. Both 0 where they are not known.
    """

    sha256: str
    bytes: int
    seconds: float
    activation_bytes: int = 0
    peak_bytes: int = 0


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
    on_progress: OnProgress | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Built:
    """Build the engine of the graph in `onnx` (external data beside it) for `ranges` and write it to `destination`.

    `module` is `tensorrt` or `tensorrt_rtx`. The file appears under its name only when it is whole. `cancelled` is
    asked at every step of the builder; what `on_progress` raises ends the build and is raised from here. Raises
    ArtifactError where the graph cannot be parsed, compiled or is not `spec`; DependencyError where the GPU, memory
    or disk is lacking; Cancelled.
    """
    started = time.monotonic()
    logger = logger_for(module)
    logger.errors.take()
    logger.activation_bytes = 0
    builder = _create_builder(module, logger)
    network = builder.create_network(network_flags(module))
    copies = copies_of_shared(onnx) if options.refittable and onnx.is_file() else {}
    parser = _parse(module, network, logger, onnx, copies)
    _check_tensors(module, network, spec, onnx)
    if options.refittable:
        _mark_weights(network, onnx)
    config = configure(module, builder, spec, ranges, options, compute_capabilities)
    if timing_cache is not None:
        _load_timing_cache(config, timing_cache)
    monitor = progress_monitor(module, spec.name, on_progress, cancelled)
    config.progress_monitor = monitor
    with EngineFile(destination, cancelled) as file:
        finished = _serialize(module, builder, network, config, file)
        del parser, copies  # the weights are their memory: not before the network is compiled
        if monitor.raised is not None:
            raise monitor.raised
        if cancelled():
            raise Cancelled(f"the build of {spec.name} was cancelled")
        if not finished and not file.refused:
            raise _build_error(module, spec.name, logger.errors.take(), onnx)
        file.keep()
    for line in logger.errors.take():
        LOG.warning("%s: %s", spec.name, line)
    if timing_cache is not None:
        _save_timing_cache(config, timing_cache)
    return Built(file.sha256, file.bytes, time.monotonic() - started, logger.activation_bytes)


def input_shapes(spec: GraphSpec, ranges: Mapping[str, Range]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The (min, opt, max) shapes of every input of `spec` that has a dynamic axis."""
    return {
        tensor.name: tuple(
            tuple(axis if isinstance(axis, int) else ranges[axis][which] for axis in tensor.shape) for which in range(3)
        )
        for tensor in spec.inputs
        if any(isinstance(axis, str) for axis in tensor.shape)
    }


def _create_builder(module: Any, logger: Any) -> Any:
    try:
        return module.Builder(logger)
    except TypeError as error:  # the binding's way to say that the library returned no builder
        raise DependencyError(
            f"{module.__name__} {module.__version__} cannot build on this machine",
            found="; ".join(logger.errors.take()) or str(error),
            wanted="an NVIDIA GPU and its driver",
            fix="sana-export doctor",
        ) from error


def _parse(module: Any, network: Any, logger: Any, onnx: Path, copies: Mapping[str, Any]) -> Any:
    """Fill `network` from the file, its weights of those names from `copies`; returns the parser, which holds the others."""
    parser = module.OnnxParser(network, logger)
    if _read(parser, onnx, copies):
        return parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [_describe(error) for error in errors]
    # The log knows more of some failures (which file is missing) and repeats the rest in another frame.
    reasons = [readable(error.desc()) for error in errors]
    log = [line for line in logger.errors.take() if not line.startswith("While parsing node")]
    found += [line for line in log if not any(reason in line or line in reason for reason in reasons)]
    raise ArtifactError(
        f"{onnx} cannot be read by {module.__name__} {module.__version__}",
        found="; ".join(found),
        wanted="an ONNX graph that it supports",
        fix="export the bundle again: sana-export export MODEL -o BUNDLE",
    )


def _read(parser: Any, onnx: Path, copies: Mapping[str, Any]) -> bool:
    if not copies:
        return bool(parser.parse_from_file(str(onnx)))
    loaded = parser.load_model_proto(onnx.read_bytes(), str(onnx))
    given = loaded and all(parser.load_initializer(name, data.ctypes.data, data.nbytes) for name, data in copies.items())
    return bool(given and parser.parse_model_proto())


def _mark_weights(network: Any, onnx: Path) -> None:
    names = [tensor.name for tensor in external_tensors(onnx.read_bytes())]
    if unmarked := [name for name in names if not network.mark_weights_refittable(name)]:
        raise ArtifactError(
            f"{onnx} cannot become a refittable engine",
            found=f"weights that the compiler does not know by their names: {', '.join(unmarked)}",
            wanted="every external weight used as it is stored",
            fix="leave out --refittable",
        )


def _describe(error: Any) -> str:
    where = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return where + readable(error.desc()).replace("\n", ": ")


def _check_tensors(module: Any, network: Any, spec: GraphSpec, onnx: Path) -> None:
    names = {getattr(module.DataType, theirs, None): ours for ours, theirs in DATA_TYPES.items()}

    def found(tensor: Any) -> TensorSpec:
        shape = tuple("?" if length < 0 else length for length in tensor.shape)
        return TensorSpec(tensor.name, names.get(tensor.dtype, str(tensor.dtype)), shape)

    def anonymous(tensor: TensorSpec) -> TensorSpec:
        return TensorSpec(tensor.name, tensor.dtype, tuple("?" if isinstance(axis, str) else axis for axis in tensor.shape))

    inputs = {found(network.get_input(index)) for index in range(network.num_inputs)}
    outputs = {found(network.get_output(index)) for index in range(network.num_outputs)}
    for kind, here, listed in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
        wanted = {anonymous(tensor) for tensor in listed}
        if here != wanted:
            raise ArtifactError(
                f"{onnx} is not the graph {spec.name!r} that the manifest describes: its {kind} differ",
                found=", ".join(sorted(map(_tensor_text, here - wanted))) or "nothing else",
                wanted=", ".join(sorted(map(_tensor_text, wanted - here))) or "nothing else",
                fix="export the bundle again: sana-export export MODEL -o BUNDLE",
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
    """The builder's configuration: target GPUs, precision rules and one optimization profile for `ranges`."""
    config = builder.create_builder_config()
    set_compute_capabilities(module, config, compute_capabilities)
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
        if config.add_optimization_profile(profile) < 0:
            lines = logger_for(module).errors.take()
            raise ValueError(f"{spec.name}: not min <= opt <= max in {shapes}: {'; '.join(lines)}")
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)


def _save_timing_cache(config: Any, path: Path) -> None:
    with disk_errors(path):
        partial = partial_path(path)
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
        partial.replace(path)


def _serialize(module: Any, builder: Any, network: Any, config: Any, file: EngineFile) -> bool:
    """Compile and hand the engine to `file`, in chunks where the version can, which saves its size in memory."""
    if not (hasattr(module, "IStreamWriter") and hasattr(builder, "build_serialized_network_to_stream")):
        memory = builder.build_serialized_network(network, config)
        return memory is not None and file.write(memory) == memory.nbytes

    class Writer(module.IStreamWriter):
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes, *_size: int) -> int:
            return file.write(data)

    return bool(builder.build_serialized_network_to_stream(network, config, Writer()))


#: What the compiler's words mean for the user: a pattern, the error it is, and the way out.
_BUILD_ERRORS: tuple[tuple[str, type[SanaExportError], str], ...] = (
    ("out ?of ?memory", DependencyError, "use a profile with smaller sizes or batches, for example --profile laptop"),
    (
        r"Unable to load library: \S*lean",
        DependencyError,
        "leave out --version-compatible (this installation lacks the lean runtime), or build with the full TensorRT",
    ),
    ("CUDA_SUCCESS", DependencyError, "build it on a machine with an NVIDIA GPU and driver, or leave out --refittable"),
    (r"\bSM\d+\b", ArtifactError, "leave that GPU out of --compute-capability, or export with --dtype fp16"),
    ("", ArtifactError, "export the bundle again: sana-export export MODEL -o BUNDLE"),
)


def _build_error(module: Any, graph: str, lines: list[str], onnx: Path) -> SanaExportError:
    found = "; ".join(lines) or "no reason given"
    error, fix = next((error, fix) for words, error, fix in _BUILD_ERRORS if re.search(words, found, re.IGNORECASE))
    return error(f"{module.__name__} {module.__version__} cannot compile {graph} ({onnx})", found=found, fix=fix)
