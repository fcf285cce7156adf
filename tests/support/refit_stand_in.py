"""A stand-in for the module's Refitter and its engine, after NVIDIA's documentation and the installed bindings' docstrings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorrt_rtx
from onnx import numpy_helper

from sana_export.manifest import GraphEntry

#: The commands that `EngineWeights` names in errors.
COMMANDS = {
    "export": "sana-export export fox -o bundle",
    "build": "sana-export build bundle --backend tensorrt-rtx --graphs denoiser --refittable",
}
TYPES = {np.dtype(np.float16): tensorrt_rtx.DataType.HALF, np.dtype(np.float32): tensorrt_rtx.DataType.FLOAT}


class Engine:
    """The weights of an engine: zeros of the types and sizes that it was built with, until it is refitted.

    `combined` are sets of weights that the compiler joined: if one of them is set, all of them have to be.
    """

    def __init__(self, prototypes: Mapping[str, np.ndarray], combined: Iterable[set[str]] = (), *, refittable: bool = True) -> None:
        self.weights = {name: np.zeros_like(value) for name, value in prototypes.items()}
        self.combined, self.refittable, self.filled = list(combined), refittable, False


class Refitter:
    """Like the module's, for an `Engine`."""

    #: Weights that it refuses.
    refuses: tuple[str, ...] = ()
    #: Weights that are still missing after they were set.
    forgets: tuple[str, ...] = ()
    #: Whether refits succeed: all of them, or each in turn. A refit that fails leaves half of the weights changed.
    works: bool | list[bool] = True

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.logger, self.given = engine, logger, {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.weights)

    def get_weights_prototype(self, name: str) -> Any:
        value = self.engine.weights[name]
        return tensorrt_rtx.Weights(TYPES[value.dtype], 0, value.size)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        if name in self.refuses:
            self.logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "these weights are refused")
            return False
        assert weights.dtype == TYPES[self.engine.weights[name].dtype]
        self.given[name] = weights.numpy()
        return True

    def get_missing_weights(self) -> list[str]:
        needed = set(self.engine.weights)
        if self.engine.filled:
            needed = set().union(*(group for group in self.engine.combined if group & set(self.given)))
        return [name for name in self.engine.weights if name in self.forgets or (name in needed and name not in self.given)]

    def refit_cuda_engine(self) -> bool:
        works = self.works.pop(0) if isinstance(self.works, list) else self.works
        for name, values in list(self.given.items())[: None if works else len(self.given) // 2]:
            self.engine.weights[name].flat = values.flat
        if not works:
            self.logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "out of device memory")
            return False
        self.engine.filled = True
        return True


def module(**changes: Any) -> Any:
    """A module with this Refitter, with changed attributes, and the real module's weights and logger."""
    return type(
        "Stub",
        (),
        {
            "Refitter": type("Refitter", (Refitter,), changes),
            "Weights": tensorrt_rtx.Weights,
            "ILogger": tensorrt_rtx.ILogger,
        },
    )


def arrays(bundle: Path, graph: GraphEntry) -> dict[str, np.ndarray]:
    """The graph's external weights, loaded by the onnx package."""
    path = bundle / graph.onnx.path
    outside = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data}
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name in outside}
