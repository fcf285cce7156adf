"""The engines of a whole bundle: plan them, build those that are missing, record each one as soon as it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sana_export.commands import engines_command, export_command, first_engines_command, repair_command
from sana_export.errors import ArtifactError, UsageError
from sana_export.files import FileEntry, check_files, disk_errors, locked, manifest_lock, require_free
from sana_export.formats.onnx_weights import check_external_data
from sana_export.formats.safetensors_file import TensorFile
from sana_export.known_files import check_known_files
from sana_export.machine import find_gpus
from sana_export.manifest import EngineEntry, Manifest
from sana_export.profiles import Profile, Range
from sana_export.progress import OnProgress, Progress
from sana_export.quantization.layers import part_of
from sana_export.quantization.schemes import FALLBACK
from sana_export.quantization.targets import check_target, lacking
from sana_export.trt.build import Built
from sana_export.trt.compatibility import not_for_here
from sana_export.trt.flavour import flavour_of, load, target_for
from sana_export.trt.layers import EngineLayer, parse_layers
from sana_export.trt.options import DEFAULT_OPTIONS, BuildOptions
from sana_export.trt.plan import PlannedEngine, plan_engines
from sana_export.trt.worker import EngineJob, build_in_child
from sana_export.user_paths import user_path

LOG = logging.getLogger(__name__)

INSTRUCTION_FILE = "instruction.safetensors"
#: Bytes of an engine beyond its weights, for kernels and tables. Measured: 0.3 to 12 MB.
ENGINE_OVERHEAD = 64 << 20


def build_bundle(
    bundle: Path,
    *,
    backend: str,
    profile: Profile,
    compute_capabilities: tuple[str, ...] = (),
    graphs: Iterable[str] | None = None,
    options: BuildOptions = DEFAULT_OPTIONS,
    instruction_tokens: int | None = None,
    on_progress: OnProgress | None = None,
    on_engine: Callable[[PlannedEngine, EngineEntry | None], None] = lambda planned, entry: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Build every engine of a bundle that is missing, damaged or stale. Returns the manifest that records them.

    Each engine is recorded as soon as it is finished, so after an interruption the next call builds only the rest. `on_engine` is
    called twice for each engine: with None before its build, and with its entry after it. `on_progress` counts engines: `done` of
    `total`, with the finished part of the current one. `instruction_tokens` is read from the bundle if it is None. Several
    processes may build into one bundle. Raises what `target_for`, `plan_engines` and `build_engine` raise. Ctrl-C leaves no
    partial file.
    """
    bundle = user_path(bundle, "the bundle")
    current = functools.partial(
        plan_bundle,
        bundle,
        backend=backend,
        profile=profile,
        compute_capabilities=compute_capabilities,
        options=options,
        instruction_tokens=instruction_tokens or read_instruction_tokens(bundle),
    )
    if warning := not_for_here(target_for(backend, load(backend), compute_capabilities), options, find_gpus()):
        LOG.warning("%s", warning)
    missing = [planned for planned in current(graphs=graphs) if not planned.exists]
    for index, planned in enumerate(missing):
        name = planned.spec.graph
        with locked(_lock_path(bundle, planned.spec.key), functools.partial(_log_wait, name)):
            # Another process that had the lock may have built it: look again.
            planned = current(graphs=(name,))[0]
            if planned.exists:
                continue
            on_engine(planned, None)
            report = None if on_progress is None else _counted(on_progress, index, len(missing))
            built = _build(bundle, planned, report, cancelled)
            on_engine(planned, _record(bundle, planned, built))
    return Manifest.load(bundle)


def plan_bundle(
    bundle: Path,
    *,
    backend: str,
    profile: Profile,
    compute_capabilities: tuple[str, ...] = (),
    graphs: Iterable[str] | None = None,
    options: BuildOptions = DEFAULT_OPTIONS,
    instruction_tokens: int | None = None,
) -> list[PlannedEngine]:
    """All engines that `build_bundle` with the same arguments needs, in its order, with those that exist. Writes nothing."""
    bundle = user_path(bundle, "the bundle")
    target, manifest = target_for(backend, load(backend), compute_capabilities), Manifest.load(bundle)
    tokens = instruction_tokens or read_instruction_tokens(bundle)
    planned = plan_engines(bundle, manifest, target, profile, instruction_tokens=tokens, options=options, graphs=graphs)
    for engine in planned:
        _check_quantized(bundle, manifest, engine)
    return planned


def _check_quantized(bundle: Path, manifest: Manifest, engine: PlannedEngine) -> None:
    """Raise UsageError if a graph's quantization scheme does not exist for the engine's target, or the engine is refittable."""
    spec, part = engine.spec, part_of(engine.spec.graph)
    if (scheme := manifest.options.scheme(spec.graph)) is None:
        return
    if spec.options.get("refittable"):
        raise UsageError(
            "quantized graphs have no refittable engines: other weights would need other scales",
            found=f"{spec.graph} in {scheme}",
            wanted="engines with fixed weights",
            fix=engines_command(bundle, spec.backend),
        )
    schemes, target = manifest.options.quantize, (spec.backend, spec.compute_capabilities)
    again = {other: FALLBACK.name if lacking(name, *target) else name for other, name in schemes.items()}
    fix = export_command(bundle, manifest, quantize=again)
    check_target(part, scheme, *target, fix=fix, named=first_engines_command(bundle, manifest))


def read_instruction_tokens(bundle: Path) -> int:
    """The number of tokens of the stored instruction: the length of its tensor `prefix` [layers, 2, heads, tokens, dim]."""
    manifest = Manifest.load(bundle)
    fix = repair_command(bundle, manifest)
    (path,) = check_known_files(bundle, [manifest.entry(bundle, INSTRUCTION_FILE)], fix=fix)
    shape = TensorFile(path, fix=fix)["prefix"].shape
    if len(shape) != 5:
        raise ArtifactError(f"{path} is damaged", found=f"prefix {shape}", wanted="5 dimensions", fix=fix)
    return int(shape[3])


def _counted(on_progress: OnProgress, finished: int, total: int) -> OnProgress:
    """Report the progress of one engine as a part of `total` engines, of which so many are finished."""

    def report(progress: Progress) -> None:
        on_progress(dataclasses.replace(progress, done=finished + progress.done / progress.total, total=total))

    return report


def list_layers(bundle: Path, planned: PlannedEngine, ranges: Mapping[str, Range]) -> tuple[EngineLayer, ...]:
    """The layers after fusion of the engine `planned`, if it accepted `ranges`. Compiles it and keeps nothing.

    Raises UsageError for another backend than TensorRT-RTX, and what `build_engine` raises.
    """
    if planned.spec.backend != "tensorrt-rtx":
        raise UsageError(
            "layers can be listed for TensorRT-RTX only", found=f"--backend {planned.spec.backend}", fix="--backend tensorrt-rtx"
        )
    with tempfile.TemporaryDirectory(prefix="sana-export-") as folder:
        job = _job(bundle, planned, Path(folder) / "engine")
        return parse_layers(build_in_child(dataclasses.replace(job, ranges=ranges, list_layers=True)).layers)


def _job(bundle: Path, planned: PlannedEngine, destination: Path) -> EngineJob:
    """What the compiler is told, for an engine in the file `destination`. Checks the graph's files and the free disk space."""
    spec, flavour = planned.spec, flavour_of(planned.spec.backend)
    manifest = Manifest.load(bundle)
    graph, export = manifest.graphs[spec.graph], repair_command(bundle, manifest)
    options = BuildOptions(**spec.options)
    onnx, *data = check_files(bundle, graph.files, fix=export)
    check_external_data(onnx, data, fix=export)
    included = [graph.onnx] if options.refittable else graph.files
    room = next(folder for folder in destination.parents if folder.is_dir())
    require_free(room, sum(file.bytes for file in included) + ENGINE_OVERHEAD, f"the engine of {spec.graph}")
    cache = bundle / "engines" / spec.backend / f"timing-{platform.node() or 'here'}.cache"
    return EngineJob(
        module=flavour.module,
        onnx=str(onnx),
        destination=str(destination),
        spec=graph.spec,
        ranges=spec.ranges,
        compute_capabilities=spec.compute_capabilities if flavour.ahead_of_time else (),
        options=options,
        timing_cache=str(cache) if flavour.timing_cache else None,
        export=export,
    )


def _build(bundle: Path, planned: PlannedEngine, on_progress: OnProgress | None, cancelled: Callable[[], bool]) -> Built:
    spec, destination = planned.spec, bundle / planned.spec.path
    job = _job(bundle, planned, destination)
    try:
        built = build_in_child(job, on_progress=on_progress, cancelled=cancelled)
    finally:
        _remove_if_empty(destination.parent)
    LOG.info(
        "%s: %.1f MB in %.1f s, at most %.2f GB of memory (%s)",
        spec.graph,
        built.bytes / 1e6,
        built.seconds,
        built.peak_bytes / 1e9,
        planned.reason,
    )
    return built


def _record(bundle: Path, planned: PlannedEngine, built: Built) -> EngineEntry:
    spec = planned.spec
    entry = EngineEntry(
        **{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)},
        key=spec.key,
        file=FileEntry(spec.path, built.sha256, built.bytes),
        profile=planned.profile,
        build_seconds=round(built.seconds, 3),
        build_peak_bytes=built.peak_bytes,
        activation_bytes=built.activation_bytes,
    )
    with locked(manifest_lock(bundle)), disk_errors(bundle / "manifest.json"):
        manifest = Manifest.load(bundle)
        kept = tuple(other for other in manifest.engines if other not in planned.superseded)
        manifest = dataclasses.replace(manifest, engines=kept).with_engine(entry)
        manifest.save(bundle)
    for other in planned.superseded:
        _discard(bundle / other.file.path)
    return entry


def _lock_path(bundle: Path, key: str) -> Path:
    return bundle / ".locks" / key


def _log_wait(graph: str) -> None:
    LOG.warning("another process is building the engine of %s: waiting for it", graph)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a running process may have mapped it
        LOG.warning("%s is no longer used but could not be deleted: %s", path, error)
    for kernels in path.parent.glob(f"{path.stem}.*.cache"):
        kernels.unlink(missing_ok=True)
    _remove_if_empty(path.parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # rmdir refuses a folder that is not empty
        folder.rmdir()
