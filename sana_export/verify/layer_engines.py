"""An engine of one graph with chosen tensors as its outputs, built and run by Polygraphy. Building and running need a GPU."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.contract import GraphSpec
from sana_export.formats.arrays import Array
from sana_export.verify.polygraphy_package import as_polygraphy, comparator, needs_strong_typing, polygraphy_failures, quiet


def polygraphy_trt(*, rtx: bool) -> Any:
    """The module polygraphy.backend.trt, for TensorRT-RTX or for TensorRT. Raises what `comparator` raises."""
    comparator(rtx=rtx)
    from polygraphy.backend import trt

    return trt


class MarkedEngine:
    """An engine with `tensors` as its outputs, for inputs of the shapes of `inputs`.

    Tensors that TensorRT's parser does not keep are left out of the results. Raises DependencyError if it cannot be built.
    """

    def __init__(self, path: Path, spec: GraphSpec, inputs: Mapping[str, Array], tensors: Sequence[str], *, rtx: bool) -> None:
        self._trt, self._spec = polygraphy_trt(rtx=rtx), spec
        self._strongly_typed = needs_strong_typing("tensorrt-rtx" if rtx else "tensorrt")
        self.engine = self._build(path, inputs, set(tensors))

    def _build(self, path: Path, inputs: Mapping[str, Array], tensors: set[str]) -> Any:
        profile = self._trt.Profile()
        for name, value in inputs.items():
            profile.add(name, *[value.shape] * 3)
        with quiet(), polygraphy_failures("build an engine"):
            builder, network, parser = self._trt.network_from_onnx_path(str(path), strongly_typed=self._strongly_typed)
            for index in range(network.num_outputs - 1, -1, -1):
                network.unmark_output(network.get_output(index))
            for layer in network:
                for index in range(layer.num_outputs):
                    if layer.get_output(index).name in tensors:
                        network.mark_output(layer.get_output(index))
            config = self._trt.create_config(builder, network, profiles=[profile])
            return self._trt.engine_from_network((builder, network, parser), config)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors as float32 arrays by name."""
        given = {tensor.name: as_polygraphy(feeds[tensor.name], tensor.dtype) for tensor in self._spec.inputs}
        return infer(self._trt.TrtRunner(self.engine), given)


def infer(runner: Any, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """The outputs of one of Polygraphy's runners as float32 or integer arrays by name."""
    feeds = dict(feeds)
    if any(not isinstance(value, np.ndarray) for value in feeds.values()):  # it takes arrays of one package
        import torch

        feeds = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in feeds.items()}
    with quiet(), polygraphy_failures("run a graph"), cuda_runtime(), runner:
        outputs = runner.infer(feeds)
        return {name: _float32(value) for name, value in outputs.items()}


@contextlib.contextmanager
def cuda_runtime() -> Iterator[None]:
    """In the block, Polygraphy finds the CUDA runtime of NVIDIA's packages, which it looks for in $LD_LIBRARY_PATH."""
    found = {str(file.parent) for folder in sys.path for file in Path(folder or ".").glob("nvidia/*/lib/libcudart.so*")}
    before = os.environ.get("LD_LIBRARY_PATH")
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*sorted(found), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = before


def _float32(value: Any) -> Array:
    """A copy: a runner uses the memory of its outputs again."""
    if not isinstance(value, np.ndarray):
        value = (value.float() if value.is_floating_point() else value).cpu().numpy()
    return np.array(value, np.float32 if value.dtype.kind == "f" else value.dtype)
