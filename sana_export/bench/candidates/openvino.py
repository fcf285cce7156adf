"""A bundle's ONNX files in OpenVINO on the CPU: another runtime of the same graphs, to compare ONNX Runtime with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.bench.candidates.runtime import RuntimeCandidate, open_candidate
from sana_export.bench.candidates.table import Job
from sana_export.commands import repair_command
from sana_export.errors import ArtifactError, DependencyError, first_line
from sana_export.formats.arrays import Array
from sana_export.known_files import check_known_files
from sana_export.manifest import Manifest
from sana_export.runtime.backends.base import Backend, BackendSettings, Session

#: Without it OpenVINO computes float32 graphs in bfloat16 on processors that have it.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def load(job: Job) -> RuntimeCandidate:
    """The job's bundle in OpenVINO. Raises DependencyError if it is not installed, WrongDevice for a workload on a GPU."""

    def open_backend(bundle: Path, manifest: Manifest) -> OpenVinoBackend:
        return OpenVinoBackend(bundle, manifest, BackendSettings(threads=job.threads))

    return open_candidate(job, open_backend)


class OpenVinoSession(Session):
    """One compiled graph. Its tensors are arrays."""

    def __init__(self, compiled: Any) -> None:
        """`compiled` is an OpenVINO CompiledModel."""
        self._request = compiled.create_infer_request()
        self._outputs = [output.any_name for output in compiled.outputs]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._request.infer({name: np.ascontiguousarray(value) for name, value in feeds.items()}, share_inputs=True)
        # The next run overwrites the request's tensors.
        return {name: self._request.get_tensor(name).data.copy() for name in self._outputs}


class OpenVinoBackend(Backend):
    """Compiles the ONNX graphs of a bundle for the CPU, for one request at a time.

    The files may differ from the bundle's in how they compute the same outputs: `replaced` has the path of another model (ONNX or
    OpenVINO IR) for some graphs. Raises DependencyError if OpenVINO is not installed.
    """

    name, device, can_refit = "openvino", "cpu", False

    def __init__(
        self, bundle: Path, manifest: Manifest, settings: BackendSettings, *, replaced: Mapping[str, Path] | None = None
    ) -> None:
        settings.reject_options(self.name)
        self.bundle, self.manifest = bundle, manifest
        self._replaced, self._fix = replaced or {}, repair_command(bundle, manifest)
        self._openvino = import_openvino()
        threads = {} if settings.threads is None else {"INFERENCE_NUM_THREADS": settings.threads}
        self._properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **_EXACT, **threads}
        self._core = self._openvino.Core()

    def load(self, graph: str) -> OpenVinoSession:
        path, *_ = check_known_files(self.bundle, self.manifest.graphs[graph].files, fix=self._fix)
        path = self._replaced.get(graph, path)
        try:
            compiled = self._core.compile_model(self._core.read_model(path), "CPU", self._properties)
        except RuntimeError as error:
            raise ArtifactError(
                f"openvino {self._openvino.__version__} cannot load {path}",
                found=first_line(error),
                wanted="a graph that its CPU plugin can run",
                fix="--backend onnxruntime",
            ) from error
        return OpenVinoSession(compiled)

    def to_device(self, array: Array) -> Array:
        return array

    def to_host(self, value: Array) -> Array:
        return value


def import_openvino() -> Any:
    """The module. Raises DependencyError if it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise DependencyError("OpenVINO is not installed", found=error, wanted="openvino", fix="pip install openvino") from error
    return openvino
