"""CUDA graphs of ONNX Runtime: a session whose work is captured once a set of input shapes, at fixed addresses, and replayed.

Source: ONNX Runtime's documentation, "CUDA Execution Provider", section "Using CUDA Graphs". The session has to be made with the
provider's option enable_cuda_graph; a run names the graph that it captures or replays by its configuration gpu_graph_id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sana_export.contract import GraphSpec
from sana_export.formats.arrays import Array
from sana_export.runtime.backends.base import Session

log = logging.getLogger(__name__)

#: For the CUDA provider of a session that captures, beside what every session is given.
PROVIDER_OPTIONS = {"enable_cuda_graph": "1"}
GRAPH_ID = "gpu_graph_id"
#: ONNX Runtime keeps what it captured as long as the session lives: beyond so many shapes runs are not captured.
MOST_SHAPES = 8

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Captured:
    """One captured graph: its binding and settings, its buffers on the device, and what was last copied into them."""

    binding: Any
    run_options: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    fed: dict[str, Any] = field(default_factory=dict)


class GraphedSession(Session):
    """As `OnnxRuntimeSession`. `plain` makes a session without graphs, for when one cannot be captured; the log says why."""

    def __init__(
        self, onnxruntime: Any, session: Any, spec: GraphSpec, place: tuple[str, int], plain: Callable[[], Session]
    ) -> None:
        self._onnxruntime, self._session, self._spec, self._place, self._plain = onnxruntime, session, spec, place, plain
        self._captured: dict[Shapes, Captured] = {}
        self._fallback: Session | None = None

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Other weights need another session; it runs without a CUDA graph."""
        plain = self._fallback or self._plain()
        plain.refit(weights)
        self._fallback = plain
        self._captured.clear()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        shapes = tuple(_shape(feeds[tensor.name]) for tensor in self._spec.inputs)
        if self._fallback is None and shapes not in self._captured:
            self._prepare(shapes, feeds)
        if self._fallback is not None:
            return self._fallback.run(feeds)
        captured = self._captured[shapes]
        for name, buffer in captured.inputs.items():
            if captured.fed.get(name) is not feeds[name] or isinstance(feeds[name], np.ndarray):
                buffer.update_inplace(feeds[name])
                captured.fed[name] = feeds[name]
        self._session.run_with_iobinding(captured.binding, captured.run_options)
        # The next run writes over the buffers; what is given out stays as it is.
        return {name: self._copy(buffer) for name, buffer in captured.outputs.items()}

    def _prepare(self, shapes: Shapes, feeds: Mapping[str, Any]) -> None:
        """Capture the work of these shapes, or settle for a session without graphs."""
        if len(self._captured) == MOST_SHAPES:
            self._give_up(f"{MOST_SHAPES} shapes are captured, and a further one was asked for")
            return
        try:
            captured = self._bind(shapes, feeds)
            self._session.run_with_iobinding(captured.binding, captured.run_options)
        except Exception as error:  # ONNX Runtime's errors have no common base; the plain session raises what is not about graphs
            self._give_up((str(error).splitlines() or [type(error).__name__])[0])
        else:
            self._captured[shapes] = captured

    def _give_up(self, reason: str) -> None:
        log.warning("onnxruntime runs %s without a CUDA graph: %s", self._spec.name, reason)
        self._captured.clear()
        self._session = None
        self._fallback = self._plain()

    def _bind(self, shapes: Shapes, feeds: Mapping[str, Any]) -> Captured:
        axes = {
            axis: length
            for tensor, shape in zip(self._spec.inputs, shapes, strict=True)
            for axis, length in zip(tensor.shape, shape, strict=True)
            if isinstance(axis, str)
        }
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(len(self._captured) + 1))
        inputs = {tensor.name: self._copy(feeds[tensor.name]) for tensor in self._spec.inputs}
        outputs = {
            tensor.name: self._empty([axes[axis] if isinstance(axis, str) else axis for axis in tensor.shape], tensor.dtype)
            for tensor in self._spec.outputs
        }
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return Captured(binding, options, inputs, outputs)

    def _copy(self, value: Any) -> Any:
        """A new tensor on the device with the values of an array or of a tensor there."""
        copy = self._empty(list(_shape(value)), value.dtype.name if isinstance(value, np.ndarray) else value.element_type())
        copy.update_inplace(value)
        return copy

    def _empty(self, shape: list[int], dtype: Any) -> Any:
        """`dtype`: a name of the contract, or ONNX's number for it."""
        element = np.dtype(dtype).type if isinstance(dtype, str) else dtype
        return self._onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element, *self._place)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape if isinstance(value, np.ndarray) else value.shape())
