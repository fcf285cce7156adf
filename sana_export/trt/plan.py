"""Which engines a bundle needs, which of them exist, and why the others have to be built.

The key of an engine hashes everything that changes the engine and nothing else. So a bundle keeps its engines if it is exported
again to the same graphs, and an engine of other weights, shapes, compiler or target is never used by mistake. A refittable engine
contains no weights, so they are not part of its key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.commands import repair_command
from sana_export.contract import DECODERS, DYNAMIC_AXES, ENCODERS, GRAPH_GROUPS, GRAPHS, GraphSpec
from sana_export.errors import ArtifactError, UsageError
from sana_export.files import check_files
from sana_export.formats.onnx_weights import structure_sha256
from sana_export.formats.recognize import not_what_was_wanted
from sana_export.manifest import EngineEntry, GraphEntry, Manifest
from sana_export.profiles import MAX_BRANCHES, UNTILED_AREA, Profile, Range
from sana_export.trt.flavour import Target, check_refittable
from sana_export.trt.options import DEFAULT_OPTIONS, FLAGS, PREVIEW_FEATURES, BuildOptions

#: The number of characters of the key in the name of an engine's folder.
KEY_CHARACTERS = 12


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine is made from. Its fields make the key, and `EngineEntry` has them under the same names."""

    #: The graph's name.
    graph: str
    #: The backend that builds it.
    backend: str
    #: The hash of the graph's files; for a refittable engine, of the graph's structure.
    onnx_sha256: str
    #: The version of the backend's Python module.
    backend_version: str
    #: The GPUs that it is for. Empty: the backend's portable engine.
    compute_capabilities: tuple[str, ...]
    #: The operating system that it runs on, or "any".
    operating_system: str
    #: min, opt and max of every dynamic axis of the graph's inputs.
    ranges: Mapping[str, Range]
    #: `BuildOptions.recorded`.
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The sha256 of all fields and of the settings of every engine, in hex."""
        fields = {**dataclasses.asdict(self), "settings": [*FLAGS, *PREVIEW_FEATURES]}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def path(self) -> str:
        """The path of the engine in the bundle."""
        return f"engines/{self.backend}/{self.key[:KEY_CHARACTERS]}/{self.graph}.engine"


@dataclass(frozen=True)
class PlannedEngine:
    """One engine of a plan."""

    #: What it is made from.
    spec: EngineSpec
    #: The name of the profile that its ranges come from.
    profile: str
    #: "exists", "missing", "damaged: ..." or "stale: ...", mostly "stale: <field> was X, is Y".
    reason: str
    #: The manifest's entries that the new engine replaces.
    superseded: tuple[EngineEntry, ...] = ()

    @property
    def exists(self) -> bool:
        """Whether the bundle has the engine already."""
        return self.reason == "exists"


def plan_engines(
    bundle: Path,
    manifest: Manifest,
    target: Target,
    profile: Profile,
    *,
    instruction_tokens: int,
    options: BuildOptions = DEFAULT_OPTIONS,
    graphs: Iterable[str] | None = None,
) -> list[PlannedEngine]:
    """The engines of `graphs` for `target` and `profile`, each with its reason. If `graphs` is None: of all that `profile` needs.

    An engine exists if the manifest records its key and the file has the recorded hash. An entry of the same graph, target and
    profile with another key is stale; the reason names the fields that differ. Engines with and without weights can both exist.
    Raises UsageError for a graph that is not in the bundle, and what `engine_spec` raises.
    """
    ranges = profile_ranges(manifest, profile, instruction_tokens)
    export = repair_command(bundle, manifest)
    specs = (
        engine_spec(bundle, manifest.graphs[name], target, ranges, options, export=export)
        for name in _chosen(manifest, profile, graphs)
    )
    return [_planned(bundle, manifest, spec, profile.name) for spec in specs]


def profile_ranges(manifest: Manifest, profile: Profile, instruction_tokens: int) -> dict[str, Range]:
    """The range of every axis of `contract.DYNAMIC_AXES` in `profile` for this bundle."""
    return profile.ranges(manifest.model, instruction_tokens=instruction_tokens, branches=_most_branches(manifest))


def engine_spec(
    bundle: Path, graph: GraphEntry, target: Target, ranges: Mapping[str, Range], options: BuildOptions, *, export: str
) -> EngineSpec:
    """What the engine of `graph` is made from. Of `ranges` it uses the axes of the graph's inputs.

    `export` is the command that exports the bundle again, for the error of a damaged file. A graph without external weights has
    nothing to refit, and one with quantized weights cannot be refitted. So `refittable` does not change their engines, unless
    LoRAs have targets in the quantized graph: whoever asks for it wants those. For a refittable engine, raises ArtifactError if
    the ONNX file is damaged, and DependencyError if this version of the backend may build a wrong one.
    """
    fixed = not graph.data or (graph.quantized and not graph.lora_targets)
    options = dataclasses.replace(options, refittable=options.refittable and not fixed)
    if options.refittable:
        check_refittable(target)
    return EngineSpec(
        graph=graph.spec.name,
        backend=target.backend,
        onnx_sha256=_structure(bundle, graph, export) if options.refittable else onnx_sha256(graph),
        backend_version=target.version,
        compute_capabilities=target.compute_capabilities,
        operating_system=target.operating_system,
        ranges={axis: ranges[axis] for axis in dynamic_axes(graph.spec)},
        options=options.recorded(),
    )


def onnx_sha256(graph: GraphEntry) -> str:
    """The sha256 of the graph's ONNX file and its external data, in hex. Without external data, that of the file."""
    if not graph.data:
        return graph.onnx.sha256
    return hashlib.sha256("".join(entry.sha256 for entry in graph.files).encode()).hexdigest()


def _structure(bundle: Path, graph: GraphEntry, export: str) -> str:
    (onnx,) = check_files(bundle, [graph.onnx], fix=export)
    try:
        return structure_sha256(onnx.read_bytes())
    except ValueError as error:
        raise not_what_was_wanted(onnx, "an ONNX model", error, fix=export) from error


def dynamic_axes(spec: GraphSpec) -> tuple[str, ...]:
    """The dynamic axes of the graph's inputs, in the contract's order."""
    used = {axis for tensor in spec.inputs for axis in tensor.shape}
    return tuple(axis for axis in DYNAMIC_AXES if axis in used)


def stale_fields(entry: EngineEntry, spec: EngineSpec) -> list[str]:
    """How a recorded engine differs from the wanted one, as "<field> was X, is Y". Empty if it does not."""
    was, now = _flat(_spec_of(entry)), _flat(spec)
    return [
        f"{name} was {was.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]


def _chosen(manifest: Manifest, profile: Profile, graphs: Iterable[str] | None) -> list[str]:
    available = [name for name in GRAPHS if name in manifest.graphs]
    available += [name for name in manifest.graphs if name not in GRAPHS]
    if graphs is None:
        unused = _unused(DECODERS, manifest, profile) | _unused(ENCODERS, manifest, profile)
        return [name for name in available if name not in unused]
    wanted = set[str]().union(*(GRAPH_GROUPS.get(name, (name,)) for name in graphs))
    if unknown := sorted(wanted - set(available)):
        raise UsageError(f"the bundle has no graph named {', '.join(unknown)}", wanted=", ".join(available))
    return [name for name in available if name in wanted]


def _most_branches(manifest: Manifest) -> int:
    """The most guidance branches that the bundle can sample with: one if guidance is embedded, three with PAG layers, else two."""
    if manifest.model.guidance_embeds:
        return 1
    return MAX_BRANCHES if manifest.options.pag_layers else MAX_BRANCHES - 1


def _unused(either: Mapping[bool, set[str]], manifest: Manifest, profile: Profile) -> set[str]:
    """The graphs of `either` (in one piece, in tiles) that the runtime uses for no image of `profile`.

    None, unless the bundle has all those that it does use.
    """
    in_tiles = {height * width > UNTILED_AREA for height, width in profile.covered(manifest.model)}
    used = set().union(*(either[tiled] for tiled in in_tiles))
    return set().union(*either.values()) - used if manifest.graphs.keys() >= used else set()


def _planned(bundle: Path, manifest: Manifest, spec: EngineSpec, profile: str) -> PlannedEngine:
    key = spec.key
    same = [entry for entry in manifest.engines if (entry.graph, entry.backend) == (spec.graph, spec.backend)]
    if exact := [entry for entry in same if entry.key == key]:
        try:
            check_files(bundle, [exact[0].file], fix="")
        except ArtifactError as error:
            return PlannedEngine(spec, profile, f"damaged: {error.message}")
        return PlannedEngine(spec, profile, "exists")
    place = (profile, spec.compute_capabilities, "refittable" in spec.options)
    stale = tuple(entry for entry in same if (entry.profile, entry.compute_capabilities, entry.refittable) == place)
    if not stale:
        return PlannedEngine(spec, profile, "missing")
    differences = stale_fields(stale[-1], spec) or ["it was built with the settings of an older version of sana-export"]
    return PlannedEngine(spec, profile, "stale: " + "; ".join(differences), stale)


def _spec_of(entry: EngineEntry) -> EngineSpec:
    return EngineSpec(**{field.name: getattr(entry, field.name) for field in dataclasses.fields(EngineSpec)})


def _flat(spec: EngineSpec) -> dict[str, str]:
    """The fields as text, with one field for each range and option."""
    fields: dict[str, Any] = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    ranges, options = fields.pop("ranges"), fields.pop("options")
    fields["onnx_sha256"] = f"{fields['onnx_sha256'][:KEY_CHARACTERS]}..."
    fields["compute_capabilities"] = ", ".join(fields["compute_capabilities"]) or "portable"
    fields |= {axis: "min {} opt {} max {}".format(*values) for axis, values in ranges.items()}
    fields |= options
    return {name: str(value) for name, value in fields.items()}
