"""A backend that runs a bundle's ONNX files on a CPU and rounds every intermediate tensor to its declared dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from sana_export.commands import repair_command
from sana_export.export.evaluator import StorageEvaluator
from sana_export.files import check_files
from sana_export.formats.arrays import Array
from sana_export.formats.onnx_weights import check_external_data
from sana_export.manifest import Manifest
from sana_export.quantization.targets import without_kernels
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.base import Backend, Session
from sana_export.runtime.memory import AUTO


class GraphEvaluator(Protocol):
    """Runs one ONNX file, as the classes of export/evaluator.py do."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...


#: Makes an evaluator of the ONNX file at a path.
Evaluator = Callable[[Path], GraphEvaluator]


class EvaluatorSession(Session):
    """One ONNX file in an evaluator."""

    def __init__(self, evaluator: GraphEvaluator) -> None:
        self.evaluator = evaluator

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self.evaluator.run(feeds)


class EvaluatorBackend(Backend):
    """A backend whose sessions are evaluators. `evaluator` makes one from an ONNX file."""

    device = "cpu"
    can_refit = False

    def __init__(self, bundle: Path, manifest: Manifest, evaluator: Evaluator, name: str) -> None:
        self.bundle, self.manifest, self.name = bundle, manifest, name
        self._evaluator = evaluator
        #: The evaluators of the loaded graphs, by graph.
        self.evaluators: dict[str, GraphEvaluator] = {}

    def load(self, graph: str) -> EvaluatorSession:
        fix = repair_command(self.bundle, self.manifest)
        path, *data = check_files(self.bundle, self.manifest.graphs[graph].files, fix=fix)
        check_external_data(path, data, fix=fix)
        self.evaluators[graph] = self._evaluator(path)
        return EvaluatorSession(self.evaluators[graph])

    def to_device(self, array: Array) -> Array:
        return array

    def to_host(self, value: Array) -> Array:
        return value


def evaluator_backend(evaluator: Evaluator, name: str) -> Callable[[Path, Manifest], EvaluatorBackend]:
    """The `backend` argument of `SanaRuntime.from_pretrained` for an evaluator."""
    return lambda bundle, manifest: EvaluatorBackend(bundle, manifest, evaluator, name)


def open_runtime(bundle: Path, backend: str = AUTO, *, device: int | None = None, threads: int | None = None) -> SanaRuntime:
    """The bundle in `backend`. "auto" evaluates a half-precision bundle on the CPU with half-precision intermediates, and one with
    types that ONNX Runtime lacks in operators that it has.

    `device` and `threads` are those of `SanaRuntime.from_pretrained`. With a device, "auto" takes a backend that uses it.
    """
    options = Manifest.load(bundle).options
    dtype, lacking = options.dtype, bool(without_kernels(options.quantize))
    if backend == AUTO and device is None and (dtype != "float32" or lacking):
        evaluator = partial(StorageEvaluator, threads=threads)
        return SanaRuntime.from_pretrained(bundle, backend=evaluator_backend(evaluator, f"cpu, {dtype} intermediates"))
    return SanaRuntime.from_pretrained(bundle, backend=backend, device=device, threads=threads)
