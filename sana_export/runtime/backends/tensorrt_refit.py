"""Sets the weights of an engine that was built without them (`BuildOptions.refittable`): all of them, or some later.

This needs a deserialized engine and so a GPU, and has not been run on one. The tests use a stand-in for the module's `Refitter`,
written from NVIDIA's documentation ("Refitting an Engine") and the installed TensorRT-RTX 1.7.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array
from sana_export.formats.onnx_weights import read_tensors
from sana_export.known_files import check_known_files
from sana_export.manifest import GraphEntry
from sana_export.trt.logger import logger_for

#: The number of weights that an error names.
_SHOWN = 8


class EngineWeights:
    """The weights of one deserialized engine. Sessions use it to fill and refit the engine.

    The values come from the bundle's files, which are checked and mapped. `module` is `tensorrt` or `tensorrt_rtx`. No work of
    `engine` may be running. `export` and `build` are the commands that export the bundle again and build a refittable engine of the
    graph. Raises ArtifactError if a file is damaged.
    """

    def __init__(self, module: Any, engine: Any, graph: GraphEntry, bundle: Path, *, export: str, build: str) -> None:
        onnx, *data = check_known_files(bundle, graph.files, fix=export)
        self._refitter = EngineRefitter(module, engine, graph.spec.name, build=build)
        #: The bundle's own values by name.
        self.own: dict[str, Array] = dict(read_tensors(onnx, data, fix=export))
        self._changed: dict[str, Array] = {}
        self._current: ChainMap[str, Array] = ChainMap(self._changed, self.own)

    def fill(self, changed: Mapping[str, Array] | None = None) -> None:
        """Set all weights of the engine: the values in `changed`, and the bundle's own for all others.

        They are mapped from the disk, and one copy of each goes to the device. This does not check the numbers; `verify` does.
        Raises ArtifactError as `EngineRefitter.set_all` does. Do not use the engine then: a part of its weights is missing.
        """
        self._changed.update(changed or {})
        self._refitter.set_all(self._current)

    def refit(self, weights: Mapping[str, Array]) -> None:
        """`Session.refit` for an engine that is filled and has no work running."""
        self._refitter.set_some(weights, self._current)
        self._changed.update(weights)


class EngineRefitter:
    """Sets weights of `engine`, an engine of `graph`. `build` is the command that builds a refittable engine."""

    def __init__(self, module: Any, engine: Any, graph: str, *, build: str) -> None:
        self._module, self._engine, self._graph, self._build = module, engine, graph, build

    def set_all(self, tensors: Mapping[str, Array]) -> None:
        """Set all weights. Raises ArtifactError unless `tensors` has exactly the engine's weights in their sizes."""
        refit = _Refit(self._module, self._engine, self._error)
        wanted = refit.names
        refit.require_empty("it asks for weights that the bundle does not have", wanted - set(tensors))
        refit.require_empty("the bundle has weights that it does not know", set(tensors) - wanted)
        refit.give(tensors)
        refit.require_empty("weights are missing", refit.missing())
        refit.run()

    def set_some(self, weights: Mapping[str, Array], current: Mapping[str, Array]) -> None:
        """Set `weights` in an engine that has all its weights. The others keep their values.

        `current` has the present values of all weights. They are needed for a weight that the compiler joined with one of
        `weights`, because both have to be set together, and to restore the weights after a refit that failed halfway. Raises
        ArtifactError if the engine is not refittable, does not know a name, or refuses a weight. The engine then has its old
        weights; if it does not, the message says so.
        """
        refit = _Refit(self._module, self._engine, self._error)
        refit.require_empty("it does not know weights", set(weights) - refit.names)
        refit.give(weights)
        joined = {name: current[name] for name in refit.missing() if name in current}
        refit.give(joined)
        refit.require_empty("weights are missing", refit.missing())
        try:
            refit.run()
        except ArtifactError as error:
            before = {name: current[name] for name in (*weights, *joined)}
            try:
                refit.give(before)
                refit.run()
            except ArtifactError as again:
                raise ArtifactError(
                    f"the engine of {self._graph} has some of its new weights and some of its old ones",
                    found=f"{error.found}; while restoring the old weights: {again.found}",
                    wanted="one set of weights",
                    fix="load the bundle again",
                ) from error
            raise

    def _error(self, what: str, found: str) -> ArtifactError:
        return ArtifactError(
            f"the bundle's weights cannot be set in the engine of {self._graph}: {what}",
            found=found,
            wanted="an engine that was built with --refittable from a graph of the same structure",
            fix=self._build,
        )


class _Refit:
    """The module's Refitter for one engine. It raises errors, which `error` makes from what is wrong and what was found."""

    def __init__(self, module: Any, engine: Any, error: Callable[[str, str], ArtifactError]) -> None:
        self._module, self._logger, self._error = module, logger_for(module), error
        if not engine.refittable:
            raise error("it was built with its weights inside", "an engine that cannot be refitted")
        self._refitter = module.Refitter(engine, self._logger)
        #: The names of all weights of the engine.
        self.names = set(self._refitter.get_all_weights())
        self._given: dict[str, Array] = {}

    def missing(self) -> list[str]:
        """The weights that have to be set too, because they belong to weights that were given."""
        return list(self._refitter.get_missing_weights())

    def give(self, tensors: Mapping[str, Array]) -> None:
        """Pass values to the Refitter. It reads them in `run`; until then the engine does not change."""
        values = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        prototypes = {name: self._refitter.get_weights_prototype(name) for name in values}
        sizes = ((name, prototypes[name].nbytes, values[name].nbytes) for name in values)
        wrong = [f"{name} ({theirs} bytes, the bundle's has {ours})" for name, theirs, ours in sizes if theirs != ours]
        self.require_empty("weights have another size", wrong)
        self._given |= values
        with self._logger.collect() as log:
            refused = [name for name in values if not self._set(name, prototypes[name], values[name])]
        self.require_empty("it refuses weights", refused, log.errors)

    def run(self) -> None:
        """Refit the engine."""
        with self._logger.collect() as log:
            if not self._refitter.refit_cuda_engine():
                raise self._error("the refit failed", "; ".join(log.errors) or "no reason given")

    def require_empty(self, what: str, names: Iterable[str], reasons: Iterable[str] = ()) -> None:
        """Raise ArtifactError if there are `names` of which `what` is true."""
        if names := sorted(names):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise self._error(what, "; ".join([", ".join(names[:_SHOWN]) + more, *reasons]))

    def _set(self, name: str, prototype: Any, values: Array) -> bool:
        weights = self._module.Weights(prototype.dtype, values.ctypes.data, prototype.size)
        return bool(self._refitter.set_named_weights(name, weights))
