"""Run a bundle on a backend of your own: plain ONNX Runtime on the CPU, which prints how long each run of a graph took.

python examples/own_backend.py engines/out/tiny "A cute panda" panda.png
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import onnxruntime

from sana_export import SanaRuntime
from sana_export.commands import export_command
from sana_export.files import check_files
from sana_export.formats.onnx_weights import check_external_data
from sana_export.manifest import Manifest
from sana_export.runtime.backends.base import Backend, Session


class PlainSession(Session):
    """One loaded graph. Inputs and outputs are numpy arrays by name."""

    def __init__(self, graph: str, path: Path) -> None:
        self.graph = graph
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        started = perf_counter()
        values = self.session.run(self.outputs, dict(feeds))
        print(f"{self.graph:<12} {1000 * (perf_counter() - started):8.1f} ms")
        return dict(zip(self.outputs, values, strict=True))


class PlainBackend(Backend):
    """Loads the graphs of one bundle. `SanaRuntime` does the rest: prompts, noise, the sampling loop, images."""

    name, device = "plain", "cpu"
    can_refit = False  # `PlainSession` has no `refit`, so there are no LoRAs

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self.bundle, self.manifest = bundle, manifest

    def load(self, graph: str) -> Session:
        fix = export_command(self.bundle, self.manifest)
        path, *data = check_files(self.bundle, self.manifest.graphs[graph].files, fix=fix)
        check_external_data(path, data, fix=fix)
        return PlainSession(graph, path)

    def to_device(self, array: Any) -> Any:
        return array  # the device is the CPU

    def to_host(self, value: Any) -> Any:
        return value


if __name__ == "__main__":
    bundle, prompt, output = sys.argv[1:]
    with SanaRuntime.from_pretrained(bundle, backend=PlainBackend) as runtime:
        runtime(prompt, seed=42).images[0].save(output)
