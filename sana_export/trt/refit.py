"""Weights for an engine that was built without them (`BuildOptions.refittable`).

`refit_engine` needs a deserialized engine and so a GPU. It has not been run on one: the tests run it against a stand-in for the
module's `Refitter`, written after NVIDIA's documentation ("Refitting an Engine") and the installed TensorRT-RTX 1.7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sana_export.errors import ArtifactError
from sana_export.manifest import GraphEntry, check_files
from sana_export.trt.logger import logger_for
from sana_export.trt.weights import Bytes, read_tensors

_SHOWN = 8


def refit_engine(module: Any, engine: Any, graph: GraphEntry, bundle: Path) -> None:
    """Give `engine` all of its weights out of the bundle's files of `graph`, which are checked first.

    `module` is `tensorrt` or `tensorrt_rtx`, `engine` its deserialized engine with no work under way. The weights are mapped from
    the disk, one copy of each goes to the device. Raises ArtifactError where a file is damaged, where the engine and the graph do
    not name the same weights, where one has another size, or where the module refuses: an engine with a part of its weights is
    never kept. Whether the numbers are right, `verify` tells.
    """
    fix = f"sana-export export MODEL -o {bundle}"
    onnx, *data = check_files(bundle, graph.files, fix=fix)
    refit_weights(module, engine, graph.spec.name, read_tensors(onnx, data))


def refit_weights(module: Any, engine: Any, graph: str, tensors: Mapping[str, Bytes]) -> None:
    """Set `tensors` (name to bytes) in `engine` and refit it. Raises ArtifactError unless they are exactly its weights."""
    logger = logger_for(module)
    logger.errors.take()
    refitter = module.Refitter(engine, logger)
    wanted = set(refitter.get_all_weights())
    _none(graph, "it asks for weights that the bundle does not hold", wanted - set(tensors))
    _none(graph, "the bundle holds weights that it has no place for", set(tensors) - wanted)
    prototypes = {name: refitter.get_weights_prototype(name) for name in tensors}
    sizes = ((name, prototypes[name].nbytes, tensors[name].nbytes) for name in tensors)
    wrong = [f"{name} ({theirs} bytes, the bundle's has {ours})" for name, theirs, ours in sizes if theirs != ours]
    _none(graph, "weights have another size", wrong)
    refused = [name for name in tensors if not _set(module, refitter, name, prototypes[name], tensors[name])]
    _none(graph, "it refuses weights", refused, logger.errors.take())
    _none(graph, "weights are missing", refitter.get_missing_weights())
    if not refitter.refit_cuda_engine():
        raise _error(graph, "the refit failed", "; ".join(logger.errors.take()) or "no reason given")


def _set(module: Any, refitter: Any, name: str, prototype: Any, values: Bytes) -> bool:
    weights = module.Weights(prototype.dtype, values.ctypes.data, prototype.size)
    return bool(refitter.set_named_weights(name, weights))


def _none(graph: str, what: str, names: Iterable[str], reasons: Iterable[str] = ()) -> None:
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
