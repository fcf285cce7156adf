"""Which engines a bundle needs, which it has, and why one has to be built.

An engine's key hashes what changes it and nothing else, so a bundle that is exported again to the same graphs keeps
its engines, and an engine of other weights, shapes, compiler or target is never taken for this one. A refittable
engine holds no weights, so those are no part of its key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.contract import DECODERS, DYNAMIC_AXES, GRAPHS, GraphSpec
from sana_export.errors import ArtifactError, UsageError
from sana_export.files import check_files
from sana_export.formats.onnx_weights import structure_sha256
from sana_export.manifest import EngineEntry, GraphEntry, Manifest
from sana_export.profiles import MAX_BRANCHES, UNTILED_AREA, Profile, Range
from sana_export.trt.flavour import Target
from sana_export.trt.options import DEFAULT_OPTIONS, BuildOptions

#: Characters of the key that name an engine's folder.
KEY_CHARACTERS = 12


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine is made from: the fields of its key, and of its `EngineEntry` under the same names."""

    graph: str
    backend: str
    onnx_sha256: str
    backend_version: str
    compute_capabilities: tuple[str, ...]
    operating_system: str
    ranges: Mapping[str, Range]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """sha256 in hex over all fields."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def path(self) -> str:
        """Where the engine lies in the bundle."""
        return f"engines/{self.backend}/{self.key[:KEY_CHARACTERS]}/{self.graph}.engine"


@dataclass(frozen=True)
class PlannedEngine:
    """One engine of a plan. `reason` is "exists", "missing", "damaged: ..." or "stale: <field> was X, is Y".

    `superseded` are the entries of the manifest that the new engine takes the place of.
    """

    recipe: EngineSpec
    profile: str
    reason: str
    superseded: tuple[EngineEntry, ...] = ()

    @property
    def exists(self) -> bool:
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
    """The engines of `graphs` (all that `profile` needs) for `target` and `profile`, each with its reason.

    An engine counts as existing where the manifest records its key and the file has the recorded hash. An entry of
    the same graph, target and profile with another key is stale, and the fields that differ are its reason; engines with
    and without weights live side by side. Raises UsageError for a graph that the bundle does not hold, ArtifactError where
    the ONNX file of a refittable engine is damaged.
    """
    ranges = profile.ranges(manifest.model, instruction_tokens=instruction_tokens, branches=_most_branches(manifest))
    return [
        _planned(bundle, manifest, engine_spec(bundle, manifest.graphs[name], target, ranges, options), profile.name)
        for name in _chosen(manifest, profile, graphs)
    ]


def engine_spec(bundle: Path, graph: GraphEntry, target: Target, ranges: Mapping[str, Range], options: BuildOptions) -> EngineSpec:
    """What the engine of `graph` is made from; of `ranges` only the axes of the graph's inputs count.

    A graph without external weights has nothing to refit: its engine is the same with `refittable` and without.
    """
    options = dataclasses.replace(options, refittable=options.refittable and bool(graph.data))
    return EngineSpec(
        graph=graph.spec.name,
        backend=target.backend,
        onnx_sha256=_structure(bundle, graph) if options.refittable else onnx_sha256(graph),
        backend_version=target.version,
        compute_capabilities=target.compute_capabilities,
        operating_system=target.operating_system,
        ranges={axis: ranges[axis] for axis in dynamic_axes(graph.spec)},
        options=options.recorded(),
    )


def onnx_sha256(graph: GraphEntry) -> str:
    """One sha256 in hex over the graph's ONNX file and its external data; that of the file where it stands alone."""
    if not graph.data:
        return graph.onnx.sha256
    return hashlib.sha256("".join(entry.sha256 for entry in graph.files).encode()).hexdigest()


def _structure(bundle: Path, graph: GraphEntry) -> str:
    (onnx,) = check_files(bundle, [graph.onnx], fix=f"sana-export export MODEL -o {bundle}")
    return structure_sha256(onnx.read_bytes())


def dynamic_axes(spec: GraphSpec) -> tuple[str, ...]:
    """The dynamic axes of the graph's inputs, in the contract's order."""
    used = {axis for tensor in spec.inputs for axis in tensor.shape}
    return tuple(axis for axis in DYNAMIC_AXES if axis in used)


def stale_fields(entry: EngineEntry, recipe: EngineSpec) -> list[str]:
    """What differs between a recorded engine and the one wanted, as "<field> was X, is Y"; empty for the same engine."""
    was, now = _flat(_spec_of(entry)), _flat(recipe)
    return [
        f"{name} was {was.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]


def _chosen(manifest: Manifest, profile: Profile, graphs: Iterable[str] | None) -> list[str]:
    held = [name for name in GRAPHS if name in manifest.graphs]
    held += [name for name in manifest.graphs if name not in GRAPHS]
    if graphs is None:
        unused = _unused_decoders(manifest, profile)
        return [name for name in held if name not in unused]
    wanted = set(graphs)
    if unknown := sorted(wanted - set(held)):
        raise UsageError(f"the bundle holds no graph named {', '.join(unknown)}", wanted=", ".join(held))
    return [name for name in held if name in wanted]


def _most_branches(manifest: Manifest) -> int:
    """The most guidance branches that the bundle is sampled with: one where guidance is embedded, a third with PAG layers."""
    if manifest.model.guidance_embeds:
        return 1
    return MAX_BRANCHES if manifest.options.pag_layers else MAX_BRANCHES - 1


def _unused_decoders(manifest: Manifest, profile: Profile) -> set[str]:
    """The decoders that no image of `profile` goes through in the runtime, as long as the bundle holds the other ones."""
    in_tiles = {height * width > UNTILED_AREA for height, width in profile.covered(manifest.model)}
    used = set().union(*(DECODERS[tiled] for tiled in in_tiles))
    return set().union(*DECODERS.values()) - used if manifest.graphs.keys() >= used else set()


def _planned(bundle: Path, manifest: Manifest, recipe: EngineSpec, profile: str) -> PlannedEngine:
    key = recipe.key
    same = [entry for entry in manifest.engines if (entry.graph, entry.backend) == (recipe.graph, recipe.backend)]
    if exact := [entry for entry in same if entry.key == key]:
        try:
            check_files(bundle, [exact[0].file], fix="")
        except ArtifactError as error:
            return PlannedEngine(recipe, profile, f"damaged: {error.message}")
        return PlannedEngine(recipe, profile, "exists")
    place = (profile, recipe.compute_capabilities, "refittable" in recipe.options)
    stale = tuple(entry for entry in same if (entry.profile, entry.compute_capabilities, entry.refittable) == place)
    if not stale:
        return PlannedEngine(recipe, profile, "missing")
    return PlannedEngine(recipe, profile, "stale: " + "; ".join(stale_fields(stale[-1], recipe)), stale)


def _spec_of(entry: EngineEntry) -> EngineSpec:
    return EngineSpec(**{field.name: getattr(entry, field.name) for field in dataclasses.fields(EngineSpec)})


def _flat(recipe: EngineSpec) -> dict[str, str]:
    """The recipe's fields as text, one for each range and option."""
    fields: dict[str, Any] = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    ranges, options = fields.pop("ranges"), fields.pop("options")
    fields["onnx_sha256"] = f"{fields['onnx_sha256'][:KEY_CHARACTERS]}..."
    fields["compute_capabilities"] = ", ".join(fields["compute_capabilities"]) or "portable"
    fields |= {axis: "min {} opt {} max {}".format(*values) for axis, values in ranges.items()}
    fields |= options
    return {name: str(value) for name, value in fields.items()}
