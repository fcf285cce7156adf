"""Weights for an engine that was built without them (`BuildOptions.refittable`), all at once or some of them later.

Both need a deserialized engine and so a GPU. They have not been run on one: the tests run them against a stand-in for the
module's `Refitter`, written after NVIDIA's documentation ("Refitting an Engine") and the installed TensorRT-RTX 1.7.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.errors import ArtifactError
from sana_export.files import check_files
from sana_export.formats.arrays import Array
from sana_export.formats.onnx_weights import read_tensors
from sana_export.manifest import GraphEntry
from sana_export.trt.logger import logger_for

_SHOWN = 8


class EngineWeights:
    """The weights of one deserialized engine of `graph`, and what they are now: what a session refits through.

    Made from the bundle's files, which are checked and mapped. `module` is `tensorrt` or `tensorrt_rtx`, `engine` has no work under
    way. Raises ArtifactError where a file is damaged.
    """

    def __init__(self, module: Any, engine: Any, graph: GraphEntry, bundle: Path) -> None:
        onnx, *data = check_files(bundle, graph.files, fix=f"sana-export export MODEL -o {bundle}")
        self._module, self._engine, self._graph = module, engine, graph.spec.name
        #: The bundle's own values by name.
        self.own: dict[str, Array] = dict(read_tensors(onnx, data))
        self._changed: dict[str, Array] = {}
        self._held: ChainMap[str, Array] = ChainMap(self._changed, self.own)

    def fill(self, changed: Mapping[str, Array] | None = None) -> None:
        """Give the engine all of its weights (`refit_weights`): the bundle's own, but those in `changed`.

        They are mapped from the disk, and one copy of each goes to the device. Whether the numbers are right, `verify` tells.
        Raises ArtifactError where the engine and the graph do not name the same weights, where one has another size, or where the
        module refuses: an engine with a part of its weights is never kept.
        """
        self._changed.update(changed or {})
        refit_weights(self._module, self._engine, self._graph, self._held)

    def refit(self, weights: Mapping[str, Array]) -> None:
        """`Session.refit`, once the engine is filled and while no work of it is under way (`refit_named`)."""
        refit_named(self._module, self._engine, self._graph, weights, self._held)
        self._changed.update(weights)


def refit_weights(module: Any, engine: Any, graph: str, tensors: Mapping[str, Array]) -> None:
    """Set `tensors` (name to values) in `engine` and refit it. Raises ArtifactError unless they are exactly its weights."""
    refit = _Refit(module, engine, graph)
    wanted = refit.names
    _require_empty(graph, "it asks for weights that the bundle does not hold", wanted - set(tensors))
    _require_empty(graph, "the bundle holds weights that it has no place for", set(tensors) - wanted)
    refit.give(tensors)
    _require_empty(graph, "weights are missing", refit.missing())
    refit.run()


def refit_named(module: Any, engine: Any, graph: str, weights: Mapping[str, Array], held: Mapping[str, Array]) -> None:
    """Set `weights` in an `engine` that is whole, and leave its others as they are.

    `held` are the values of all of its weights now, looked up where they are needed: for a weight that the compiler joined with
    one of `weights`, which has to be given along with it, and for the way back, since a refit that fails may have changed a part.
    Raises ArtifactError for an engine that is not refittable, a name that it does not know, another size, a refusal; the engine
    then holds what it held, or the message says that it does not.
    """
    refit = _Refit(module, engine, graph)
    _require_empty(graph, "it has no place for weights", set(weights) - refit.names)
    refit.give(weights)
    joined = {name: held[name] for name in refit.missing() if name in held}
    refit.give(joined)
    _require_empty(graph, "weights are missing", refit.missing())
    try:
        refit.run()
    except ArtifactError as error:
        before = {name: held[name] for name in (*weights, *joined)}
        try:
            refit.give(before)
            refit.run()
        except ArtifactError as again:
            raise ArtifactError(
                f"the engine of {graph} holds a part of its new weights and a part of its old ones",
                found=f"{error.found}; on the way back {again.found}",
                wanted="one set of weights",
                fix="load the bundle again",
            ) from error
        raise


class _Refit:
    """The module's Refitter over one engine, with its refusals as errors."""

    def __init__(self, module: Any, engine: Any, graph: str) -> None:
        self._module, self._graph = module, graph
        if not engine.refittable:
            raise _error(graph, "it was built with its weights inside", "an engine that cannot be refitted")
        self._logger = logger_for(module)
        self._logger.errors.take()
        self._refitter = module.Refitter(engine, self._logger)
        self.names = set(self._refitter.get_all_weights())
        self._given: dict[str, Array] = {}

    def missing(self) -> list[str]:
        """The weights that have to be given with those that were."""
        return list(self._refitter.get_missing_weights())

    def give(self, tensors: Mapping[str, Array]) -> None:
        """Set values, which are read when the refit runs; nothing of the engine changes yet."""
        values = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        prototypes = {name: self._refitter.get_weights_prototype(name) for name in values}
        sizes = ((name, prototypes[name].nbytes, values[name].nbytes) for name in values)
        wrong = [f"{name} ({theirs} bytes, the bundle's has {ours})" for name, theirs, ours in sizes if theirs != ours]
        _require_empty(self._graph, "weights have another size", wrong)
        self._given |= values
        refused = [name for name in values if not self._set(name, prototypes[name], values[name])]
        _require_empty(self._graph, "it refuses weights", refused, self._logger.errors.take())

    def run(self) -> None:
        if not self._refitter.refit_cuda_engine():
            raise _error(self._graph, "the refit failed", "; ".join(self._logger.errors.take()) or "no reason given")

    def _set(self, name: str, prototype: Any, values: Array) -> bool:
        weights = self._module.Weights(prototype.dtype, values.ctypes.data, prototype.size)
        return bool(self._refitter.set_named_weights(name, weights))


def _require_empty(graph: str, what: str, names: Iterable[str], reasons: Iterable[str] = ()) -> None:
    if names := sorted(names):
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise _error(graph, what, "; ".join([", ".join(names[:_SHOWN]) + more, *reasons]))


def _error(graph: str, what: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"the engine of {graph} cannot be given the bundle's weights: {what}",
        found=found,
        wanted="an engine that was built with --refittable from a graph of the same structure",
        fix="sana-export build BUNDLE --backend BACKEND --refittable",
    )
