"""Which of a bundle's engines run on this machine, and which of those to use for a request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sana_export.commands import build_command, engines_command
from sana_export.contract import DECODERS, ENCODERS, OPTIONAL_GRAPHS
from sana_export.errors import ArtifactError, UsageError
from sana_export.hub.origin import origin_of
from sana_export.manifest import EngineEntry, Manifest, ModelInfo
from sana_export.profiles import UNTILED_AREA, Range, describe_range, outside
from sana_export.trt.compatibility import Host, build_options, incompatibilities, mismatches, missing_parts


@dataclass(frozen=True)
class EngineSet:
    """Engines of one backend."""

    #: Their bundle.
    bundle: Path
    #: The backend that built them.
    backend: str
    #: The engines of each graph, the ones with the narrowest ranges first: they are tuned closest to the shapes that they cover.
    engines: Mapping[str, Sequence[EngineEntry]]

    def engine_for(self, graph: str, axes: Mapping[str, int], *, refittable: bool = False) -> EngineEntry | None:
        """The first engine of `graph` whose ranges cover `axes`, or None. Axes that it does not have do not matter.

        `refittable`: look only at engines whose weights can be changed.
        """
        entries = self.refittable(graph) if refittable else self.engines[graph]
        return next((entry for entry in entries if not outside(entry.ranges, axes)), None)

    def refittable(self, graph: str) -> list[EngineEntry]:
        """The engines of `graph` whose weights can be changed."""
        return [entry for entry in self.engines.get(graph, ()) if entry.refittable]

    def check_supported(self, graphs: Iterable[str], axes: Mapping[str, int]) -> None:
        """Raise UsageError unless there is an engine for each of `graphs`. It says what is possible and how to build more."""
        missing = [graph for graph in graphs if not self.engines.get(graph)]
        outside = [graph for graph in graphs if graph not in missing and self.engine_for(graph, axes) is None]
        if not missing and not outside:
            return
        height, width, batch = axes["image_height"], axes["image_width"], axes["batch"]
        request = f"{batch} images of {height}x{width} (height x width), {axes['branches']} guidance branches"
        raise UsageError(
            f"{self.bundle} has no {self.backend} engine for this request",
            found=request + "".join(f"; no engine of {graph}" for graph in missing),
            wanted="; or ".join(self._possible(outside[0] if outside else missing[0], axes)) or "engines of every graph",
            fix=build_command(self.bundle, self.backend, height=height, width=width, batch=batch),
        )

    def typical(self, model: ModelInfo) -> dict[str, EngineEntry]:
        """The engines for one image of the native size, one per graph that it needs. If none covers that size, the first one."""
        axes = typical_axes(model)
        tiled = axes["image_height"] * axes["image_width"] > UNTILED_AREA
        kinds = [kind for kind in (DECODERS, ENCODERS) if self.engines.keys() >= kind[tiled]]
        unused = set().union(*(kind[not tiled] for kind in kinds))
        return {graph: self.engine_for(graph, axes) or entries[0] for graph, entries in self.engines.items() if graph not in unused}

    def _possible(self, graph: str, axes: Mapping[str, int]) -> list[str]:
        """The range of each engine of `graph`, on the axes in `axes`. Sizes of latents are given in pixels of the image."""
        pixels = axes["image_height"] // axes["latent_height"]

        def text(axis: str, values: Range) -> str:
            if axis in ("latent_height", "latent_width"):
                lowest, typical, highest = (value * pixels for value in values)
                return f"{axis.removeprefix('latent_')} {describe_range((lowest, typical, highest))} px"
            return f"{axis} {describe_range(values)}"

        return [
            f"{graph} ({entry.profile}): " + ", ".join(text(axis, values) for axis, values in entry.ranges.items() if axis in axes)
            for entry in self.engines.get(graph, ())
        ]


def typical_axes(model: ModelInfo) -> dict[str, int]:
    """The axes of the typical request: one image of the native size."""
    side = model.native_size
    latent, feature = side // model.vae_scale_factor, side // model.decoder_tile_scale
    encoded = side // model.encoder_tile_scale
    lengths = {"latent": latent, "image": side, "feature": feature, "encoded": encoded, "output": side}
    axes = {f"{kind}_{direction}": length for kind, length in lengths.items() for direction in ("height", "width")}
    branches = 1 if model.guidance_embeds else 2
    return {"batch": 1, "branches": branches, "text_branches": branches, **axes}


def runnable(bundle: Path, manifest: Manifest, backend: str, host: Host) -> EngineSet:
    """The engines of `backend` that run on `host`.

    Raises ArtifactError if there is none for a graph that every image needs; the error says why each engine does not run and what
    to do. Which decoder an image needs depends on its size, and not every request starts from an image: `EngineSet.check_supported`
    checks that.
    """
    sometimes = set().union(*DECODERS.values(), OPTIONAL_GRAPHS)
    graphs = [graph for graph in manifest.graphs if graph not in sometimes]
    entries = [entry for entry in manifest.engines if entry.backend == backend]
    absent = not_downloaded(bundle, entries)
    reasons = {entry.key: incompatibilities(entry, host) or absent.get(entry.key, []) for entry in entries}
    found = engine_set(bundle, backend, (entry for entry in entries if not reasons[entry.key]))
    missing = [graph for graph in graphs if graph not in found.engines]
    if missing:
        why = list(dict.fromkeys(reason for entry in entries if entry.graph in missing for reason in reasons[entry.key]))
        raise ArtifactError(
            f"{bundle} has no {backend} engine of {', '.join(missing)} that runs here",
            found="; ".join(why) or "none was built",
            wanted="engines of " + ", ".join(graphs),
            fix=_fix(bundle, backend, [[entry for entry in entries if entry.graph == graph] for graph in missing], host, absent),
        )
    return found


def engines_for(manifest: Manifest, host: Host, backend: str | None = None) -> list[EngineEntry]:
    """The engines that run on `host`, wherever their files are. `backend`: only those of this backend."""
    return [entry for entry in manifest.engines if backend in (None, entry.backend) and not incompatibilities(entry, host)]


def not_downloaded(bundle: Path, engines: Iterable[EngineEntry]) -> dict[str, list[str]]:
    """Why engines of a bundle from the hub are not here, by key: only those that run on a machine are downloaded to it."""
    if origin_of(bundle) is None:
        return {}
    absent = (entry for entry in engines if not (bundle / entry.file.path).exists())
    return {entry.key: [f"file: {entry.file.path} was not downloaded"] for entry in absent}


def _fix(
    bundle: Path, backend: str, entries: Iterable[Sequence[EngineEntry]], host: Host, absent: Mapping[str, Sequence[str]]
) -> str:
    """What to do if none of these engines, listed per graph, runs on `host`: build, or only install or download what is missing."""
    fixes = missing_parts(backend, host).values()
    enough = all(any(not mismatches(entry, host) for entry in of_graph) for of_graph in entries)
    if enough and not fixes and absent and (origin := origin_of(bundle)) is not None:
        return origin.pull_command()
    return "; ".join(fixes) if fixes and enough else engines_command(bundle, backend, *build_options(backend, host.gpus))


def engine_set(bundle: Path, backend: str, entries: Iterable[EngineEntry]) -> EngineSet:
    """`entries` by graph, even if they do not run on this machine."""
    sets: dict[str, list[EngineEntry]] = {}
    for entry in sorted(entries, key=_breadth):
        sets.setdefault(entry.graph, []).append(entry)
    return EngineSet(bundle, backend, sets)


def _breadth(entry: EngineEntry) -> tuple[bool, float]:
    """The order of engines: those for a certain compute capability before portable ones, then by the width of their ranges."""
    spans = (math.log(highest / lowest) for lowest, _, highest in entry.ranges.values())
    return not entry.compute_capabilities, sum(spans)
