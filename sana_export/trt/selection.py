"""Which of a bundle's engines run here, and which of those serves a request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sana_export.commands import build_line
from sana_export.contract import DECODERS
from sana_export.errors import ArtifactError, UsageError
from sana_export.manifest import EngineEntry, Manifest, ModelInfo
from sana_export.profiles import UNTILED_AREA, Range, describe_range, outside
from sana_export.trt.compatibility import Host, incompatibilities


@dataclass(frozen=True)
class EngineSet:
    """The engines of one backend that run here, by graph, the narrowest first: it is tuned the closest to what it serves."""

    bundle: Path
    backend: str
    engines: Mapping[str, Sequence[EngineEntry]]

    def engine_for(self, graph: str, axes: Mapping[str, int], *, refittable: bool = False) -> EngineEntry | None:
        """The first engine of `graph` whose ranges hold `axes`; axes that it does not have are not looked at.

        `refittable`: of those engines alone.
        """
        entries = self.refittable(graph) if refittable else self.engines[graph]
        return next((entry for entry in entries if not outside(entry.ranges, axes)), None)

    def refittable(self, graph: str) -> list[EngineEntry]:
        """The engines of `graph` whose weights can be changed."""
        return [entry for entry in self.engines.get(graph, ()) if entry.refittable]

    def check_supported(self, graphs: Iterable[str], axes: Mapping[str, int]) -> None:
        """Raise UsageError, listing what is possible and the line that makes the rest so, unless each of `graphs` is served."""
        lacking = [graph for graph in graphs if not self.engines.get(graph)]
        unserved = [graph for graph in graphs if graph not in lacking and self.engine_for(graph, axes) is None]
        if not lacking and not unserved:
            return
        height, width, batch = axes["image_height"], axes["image_width"], axes["batch"]
        asked = f"{batch} images of {height}x{width} (height x width), {axes['branches']} guidance branches"
        raise UsageError(
            f"no {self.backend} engine of {self.bundle} serves this request",
            found=asked + "".join(f"; no engine of {graph}" for graph in lacking),
            wanted="; or ".join(self._possible(unserved[0] if unserved else lacking[0], axes)) or "engines of every graph",
            fix=build_line(self.bundle, self.backend, height=height, width=width, batch=batch),
        )

    def typical(self, model: ModelInfo) -> dict[str, EngineEntry]:
        """The engine of each graph that one image of the native size runs, or the first that there is."""
        axes = typical_axes(model)
        tiled = axes["image_height"] * axes["image_width"] > UNTILED_AREA
        unused = DECODERS[not tiled] if self.engines.keys() >= DECODERS[tiled] else set()
        return {graph: self.engine_for(graph, axes) or entries[0] for graph, entries in self.engines.items() if graph not in unused}

    def _possible(self, graph: str, axes: Mapping[str, int]) -> list[str]:
        """What each engine of `graph` can do, on the axes that are asked for; sizes of latents in pixels of the image."""
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
    """The axes of the request that is expected: one image of the native size."""
    side = model.native_size
    latent, feature = side // model.vae_scale_factor, side // model.decoder_tile_scale
    lengths = {"latent": latent, "image": side, "feature": feature, "output": side}
    axes = {f"{kind}_{direction}": length for kind, length in lengths.items() for direction in ("height", "width")}
    return {"batch": 1, "branches": 1 if model.guidance_embeds else 2, **axes}


def runnable(bundle: Path, manifest: Manifest, backend: str, machine: Host) -> EngineSet:
    """The engines of `backend` that run on `machine`.

    Raises ArtifactError where a graph that every image needs has none, with what speaks against each engine and the line that makes
    one. Which decoder an image needs depends on its size: `EngineSet.check_supported` tells.
    """
    graphs = [graph for graph in manifest.graphs if graph not in set().union(*DECODERS.values())]
    entries = [entry for entry in manifest.engines if entry.backend == backend]
    reasons = {entry.key: incompatibilities(entry, machine) for entry in entries}
    fit = engine_set(bundle, backend, (entry for entry in entries if not reasons[entry.key]))
    missing = [graph for graph in graphs if graph not in fit.engines]
    if missing:
        against = list(dict.fromkeys(reason for entry in entries if entry.graph in missing for reason in reasons[entry.key]))
        raise ArtifactError(
            f"{bundle} has no {backend} engine of {', '.join(missing)} that runs here",
            found="; ".join(against) or "none was built",
            wanted="engines of " + ", ".join(graphs),
            fix=f"sana-export build {bundle} --backend {backend}",
        )
    return fit


def engine_set(bundle: Path, backend: str, entries: Iterable[EngineEntry]) -> EngineSet:
    """`entries` by graph, whether they run here or not."""
    sets: dict[str, list[EngineEntry]] = {}
    for entry in sorted(entries, key=_breadth):
        sets.setdefault(entry.graph, []).append(entry)
    return EngineSet(bundle, backend, sets)


def _breadth(entry: EngineEntry) -> tuple[bool, float]:
    """How much more than one shape an engine serves; one for a compute capability of its own comes before a portable one."""
    spans = (math.log(highest / lowest) for lowest, _, highest in entry.ranges.values())
    return not entry.compute_capabilities, sum(spans)
