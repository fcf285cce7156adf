"""CUDA graphs of ONNX Runtime: a session captures its work for the first input shapes, at fixed addresses, and replays it.

Source: ONNX Runtime's documentation, "CUDA Execution Provider", section "Using CUDA Graphs". The session is created with the
provider option enable_cuda_graph. A session can capture several graphs, but not ours: its MatMul of one matrix with each of a batch
copies addresses from the memory of the host. A captured copy reads them again at each replay, even after work for other shapes has
overwritten it. On an H100, ONNX Runtime 1.31.1 then failed with "an illegal memory access was encountered".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sana_export.contract import GraphSpec
from sana_export.errors import first_line
from sana_export.formats.arrays import Array
from sana_export.runtime.backends.base import Session
from sana_export.runtime.backends.onnxruntime_provider import cuda_failures

log = logging.getLogger(__name__)

#: The additional options of the CUDA provider in a session that captures.
PROVIDER_OPTIONS = {"enable_cuda_graph": "1"}
Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Captured:
    """The captured graph."""

    #: The shapes of its inputs.
    shapes: Shapes
    #: The binding of its buffers.
    binding: Any
    #: The buffers of its inputs on the device, by name.
    inputs: Mapping[str, Any]
    #: The buffers of its outputs on the device, by name.
    outputs: Mapping[str, Any]
    #: What was last copied into each input's buffer.
    fed: dict[str, Any] = field(default_factory=dict)


class GraphedSession(Session):
    """Like `OnnxRuntimeSession`, with a captured graph.

    `plain` creates a session without one. It is used if the work cannot be captured, and for good as soon as the shapes change; the
    log then says why. Raises DependencyError if CUDA fails.
    """

    def __init__(
        self, onnxruntime: Any, session: Any, spec: GraphSpec, place: tuple[str, int], plain: Callable[[], Session]
    ) -> None:
        self._onnxruntime, self._session, self._spec, self._place, self._plain = onnxruntime, session, spec, place, plain
        self._captured: Captured | None = None
        self._fallback: Session | None = None

    def refit(self, weights: Mapping[str, Array]) -> None:
        """New weights need a new session. It runs without CUDA graphs."""
        plain = self._fallback or self._plain()
        plain.refit(weights)
        self._fallback, self._session, self._captured = plain, None, None

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        shapes = tuple(_shape(feeds[tensor.name]) for tensor in self._spec.inputs)
        if self._fallback is None and self._captured is None:
            self._capture(shapes, feeds)
        elif self._captured is not None and self._captured.shapes != shapes:
            self._give_up("the shapes of its inputs have changed")
        if self._captured is None:
            assert self._fallback is not None
            return self._fallback.run(feeds)
        captured = self._captured
        with cuda_failures(f"running {self._spec.name}", self._place[0]):
            for name, buffer in captured.inputs.items():
                if captured.fed.get(name) is not feeds[name] or isinstance(feeds[name], np.ndarray):
                    buffer.update_inplace(feeds[name])
                    captured.fed[name] = feeds[name]
            self._session.run_with_iobinding(captured.binding)
            # The next run overwrites the buffers, so the caller gets copies.
            return {name: self._copy(buffer) for name, buffer in captured.outputs.items()}

    def _capture(self, shapes: Shapes, feeds: Mapping[str, Any]) -> None:
        """Capture the work for these shapes, or switch to a session without graphs."""
        try:
            captured = self._bind(shapes, feeds)
            self._session.run_with_iobinding(captured.binding)
        except Exception as error:  # they have no common base; an error that is not about graphs comes back from the plain session
            self._give_up(first_line(error))
        else:
            self._captured = captured

    def _give_up(self, reason: str) -> None:
        log.warning("onnxruntime runs %s without a CUDA graph: %s", self._spec.name, reason)
        self._session = self._captured = None
        self._fallback = self._plain()

    def _bind(self, shapes: Shapes, feeds: Mapping[str, Any]) -> Captured:
        axes = {
            axis: length
            for tensor, shape in zip(self._spec.inputs, shapes, strict=True)
            for axis, length in zip(tensor.shape, shape, strict=True)
            if isinstance(axis, str)
        }
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
        return Captured(shapes, binding, inputs, outputs)

    def _copy(self, value: Any) -> Any:
        """A new tensor on the device with the values of an array or of a tensor."""
        copy = self._empty(list(_shape(value)), value.dtype.name if isinstance(value, np.ndarray) else value.element_type())
        copy.update_inplace(value)
        return copy

    def _empty(self, shape: list[int], dtype: Any) -> Any:
        """A new tensor on the device. `dtype` is the contract's name or ONNX's number."""
        element = np.dtype(dtype).type if isinstance(dtype, str) else dtype
        return self._onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element, *self._place)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape if isinstance(value, np.ndarray) else value.shape())
