"""The engines of a whole bundle: plan, build what is missing, record each engine as soon as it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

from sana_export.files import FileEntry, check_files, disk_errors, locked, manifest_lock, require_free
from sana_export.formats.safetensors_file import TensorFile
from sana_export.manifest import EngineEntry, GraphEntry, Manifest
from sana_export.profiles import Profile
from sana_export.trt.build import Built
from sana_export.trt.flavour import flavour_of, load, target_for
from sana_export.trt.options import DEFAULT_OPTIONS, BuildOptions
from sana_export.trt.plan import PlannedEngine, plan_engines
from sana_export.trt.progress import OnProgress
from sana_export.trt.worker import Job, build_in_child

LOG = logging.getLogger(__name__)

INSTRUCTION_FILE = "instruction.safetensors"
#: Bytes of an engine beyond its weights: kernels and tables. Measured: 0.3 to 12 MB.
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
    """Build every engine that `plan` finds missing, damaged or stale, and return the manifest that records them.

    Each engine is recorded as soon as it is whole, so an interrupted build goes on with the next one. `on_engine` is
    called with each planned engine: before its build with None, after it with its entry. `instruction_tokens` is read
    from the bundle where it is not given. Several processes may build into one bundle. Raises DependencyError,
    UsageError, ArtifactError as `target_for`, `plan` and `build_engine` do; Ctrl-C leaves no partial file.
    """
    current = functools.partial(
        plan_bundle,
        bundle,
        backend=backend,
        profile=profile,
        compute_capabilities=compute_capabilities,
        options=options,
        instruction_tokens=instruction_tokens or read_instruction_tokens(bundle),
    )
    for planned in current(graphs=graphs):
        if planned.exists:
            continue
        name = planned.recipe.graph
        with locked(_lock_path(bundle, planned.recipe.key), functools.partial(_log_wait, name)):
            # Whoever held the lock may have built it: look again.
            planned = current(graphs=(name,))[0]
            if planned.exists:
                continue
            on_engine(planned, None)
            built = _build(bundle, Manifest.load(bundle).graphs[name], planned, on_progress, cancelled)
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
    """What `build_bundle` with the same arguments finds and would build, in its order. Nothing is written."""
    target = target_for(backend, load(backend), compute_capabilities)
    tokens = instruction_tokens or read_instruction_tokens(bundle)
    return plan_engines(bundle, Manifest.load(bundle), target, profile, instruction_tokens=tokens, options=options, graphs=graphs)


def read_instruction_tokens(bundle: Path) -> int:
    """Tokens of the stored instruction: the length of its tensor `prefix` [layers, 2, heads, tokens, dim]."""
    tensors = TensorFile(bundle / INSTRUCTION_FILE, fix=f"sana-export export MODEL -o {bundle}")
    return int(tensors["prefix"].shape[3])


def _build(
    bundle: Path,
    graph: GraphEntry,
    planned: PlannedEngine,
    on_progress: OnProgress | None,
    cancelled: Callable[[], bool],
) -> Built:
    recipe, flavour = planned.recipe, flavour_of(planned.recipe.backend)
    options = BuildOptions(**recipe.options)
    onnx, *_ = check_files(bundle, graph.files, fix=f"sana-export export MODEL -o {bundle}")
    destination = bundle / recipe.path
    held = [graph.onnx] if options.refittable else graph.files
    require_free(bundle, sum(file.bytes for file in held) + ENGINE_OVERHEAD, f"the engine of {recipe.graph}")
    cache = bundle / "engines" / recipe.backend / f"timing-{platform.node() or 'here'}.cache"
    job = Job(
        module=flavour.module,
        onnx=str(onnx),
        destination=str(destination),
        spec=graph.spec,
        ranges=recipe.ranges,
        compute_capabilities=recipe.compute_capabilities if flavour.ahead_of_time else (),
        options=options,
        timing_cache=str(cache) if flavour.timing_cache else None,
    )
    try:
        built = build_in_child(job, on_progress=on_progress, cancelled=cancelled)
    finally:
        _remove_if_empty(destination.parent)
    LOG.info(
        "%s: %.1f MB in %.1f s, at most %.2f GB of memory (%s)",
        recipe.graph,
        built.bytes / 1e6,
        built.seconds,
        built.peak_bytes / 1e9,
        planned.reason,
    )
    return built


def _record(bundle: Path, planned: PlannedEngine, built: Built) -> EngineEntry:
    recipe = planned.recipe
    entry = EngineEntry(
        **{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)},
        key=recipe.key,
        file=FileEntry(recipe.path, built.sha256, built.bytes),
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
    LOG.warning("another process builds the engine of %s: waiting for it", graph)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # it may be mapped by a running process
        LOG.warning("%s is no longer used and could not be deleted: %s", path, error)
    for kernels in path.parent.glob(f"{path.stem}.*.cache"):
        kernels.unlink(missing_ok=True)
    _remove_if_empty(path.parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # rmdir refuses a folder that holds something
        folder.rmdir()
