"""Half precision on a CPU: what a GPU would store, and how large each tensor gets.

ONNX Runtime's CPU provider computes most float16 nodes in float32 and drops the casts between neighbors, so an overflow that a GPU
would hit never shows. So a graph is rewritten (evaluator_graphs.py) to compute in float32 and to round every intermediate tensor to
the dtype that the graph declares for it. That is what a GPU stores, with wider accumulation in products. Without the rounding, the
same rewriting measures how large every intermediate tensor gets. Both can also return intermediate tensors, to find where they
begin to differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from sana_export.export.evaluator_graphs import HALF, cut, half_values, typed_model, widen, with_shapes
from sana_export.export.plain_fp4 import has_fp4
from sana_export.formats.arrays import Array
from sana_export.formats.linked_files import pass_linked_files
from sana_export.formats.quantized import UNROUNDED_ACTIVATIONS

CPU = ("CPUExecutionProvider",)
LARGEST = {"float16": 65504.0, "bfloat16": float(np.finfo(np.float32).max)}


@dataclass(frozen=True)
class Range:
    """How large one intermediate tensor got."""

    graph: str
    #: Its name in the ONNX file.
    tensor: str
    #: The type of the node that computes it.
    operator: str
    #: The dtype that the graph stores it in.
    dtype: str
    #: The largest magnitude that it reached.
    largest: float

    @property
    def headroom(self) -> float:
        """How many times larger the tensor could get before it overflows. Below 1 it overflows."""
        return LARGEST[self.dtype] / self.largest if self.largest else float("inf")


class StorageEvaluator:
    """Runs one ONNX file on the CPU with every half-precision intermediate rounded to its declared dtype.

    Feeds and results are numpy arrays: float16 for tensors that the graph declares as float16, and float32 with the same values for
    bfloat16, which numpy does not have. A graph without half precision runs unchanged. Without `round_inputs`, layers whose inputs
    the graph rounds to 8 bits read them as they are.
    """

    def __init__(self, path: Path, threads: int | None = None, *, round_inputs: bool = True) -> None:
        model = typed_model(path, round_inputs=round_inputs)
        self._dtypes: Mapping[str, int] = {}
        if not half_values(model):
            plain = round_inputs and not has_fp4(model)  # so the model is what the file contains
            self._session = _file_session(path, threads) if plain else _session(model, path.parent, threads, optimized=True)
            return
        self._dtypes = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
        self._session = _session(widen(model, store=True), path.parent, threads)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self._session.get_outputs()]
        results = self._session.run(names, _wide(self._session, feeds))
        return {
            name: value.astype(np.float16) if self._dtypes.get(name) == TensorProto.FLOAT16 else value
            for name, value in zip(names, results, strict=True)
        }


class RangeMeter:
    """Runs one ONNX file without rounding and records the largest magnitude of every half-precision intermediate tensor."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        model = typed_model(path)
        self._graph = model.graph.name
        self._outputs = [output.name for output in model.graph.output]
        self._values = half_values(model)
        self._operators = {name: node.op_type for node in model.graph.node for name in node.output}
        measured = [name for name in self._values if name in self._operators]
        widened = widen(model, store=False)
        # An overflow becomes NaN further on, so NaN counts as an overflow. (ReduceMax ignores it.)
        widened.graph.initializer.append(onnx.numpy_helper.from_array(np.array(np.inf, np.float32), "//infinity"))
        for name in measured:
            widened.graph.node.extend(
                [
                    helper.make_node("Abs", [name], [f"{name}//abs"]),
                    helper.make_node("IsNaN", [name], [f"{name}//nan"]),
                    helper.make_node("Where", [f"{name}//nan", "//infinity", f"{name}//abs"], [f"{name}//size"]),
                    helper.make_node("ReduceMax", [f"{name}//size"], [f"{name}//max"], keepdims=0),
                ]
            )
            widened.graph.output.append(helper.make_tensor_value_info(f"{name}//max", TensorProto.FLOAT, []))
        self._largest = dict.fromkeys(measured, 0.0)
        self._session = _session(widened, path.parent, threads)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The graph's outputs, computed in float32. Updates the magnitudes that `ranges` reports."""
        names = [*self._outputs, *(f"{name}//max" for name in self._largest)]
        results = dict(zip(names, self._session.run(names, _wide(self._session, feeds)), strict=True))
        for name, largest in self._largest.items():
            self._largest[name] = max(largest, float(results[f"{name}//max"]))
        return {name: results[name] for name in self._outputs}

    def ranges(self) -> list[Range]:
        """One entry for each tensor, the one with the least headroom first."""
        found = (
            Range(self._graph, name, self._operators[name], HALF[self._values[name]], largest)
            for name, largest in self._largest.items()
        )
        return sorted(found, key=lambda entry: entry.headroom)


class TensorEvaluator:
    """Runs the part of one ONNX file that chosen intermediate tensors depend on, and returns these.

    `arithmetic` says how. "float32": in float32 throughout. "stored": the same, with every half-precision tensor rounded to its
    dtype. "native": as ONNX Runtime runs the file, with its optimizations, on `providers`; it has no bfloat16. Results are
    float32 in each case. Chosen tensors are never fused away.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[str],
        threads: int | None = None,
        *,
        arithmetic: str,
        providers: Sequence[Any] = CPU,
        shapes: bool = False,
    ) -> None:
        model = cut(typed_model(path), tensors)
        native = arithmetic == "native"
        model = model if native else widen(model, store=arithmetic == "stored")
        if shapes:
            model = with_shapes(model)
        self._tensors = tuple(tensors)
        self._session = _session(model, path.parent, threads, optimized=native, providers=providers)

    def get_providers(self) -> list[str]:
        """The execution providers of the session, as ONNX Runtime names this method."""
        return list(self._session.get_providers())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The chosen tensors, in their order. With `shapes`: their shapes, which takes no memory for their values."""
        values = self._session.run(None, _wide(self._session, feeds))
        return {
            name: value.astype(np.float32) if value.dtype == np.float16 else value
            for name, value in zip(self._tensors, values, strict=True)
        }


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    """The options of a session. ONNX Runtime chooses the number of threads if `threads` is None."""
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry(*UNROUNDED_ACTIVATIONS)
    return options


def _file_session(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    """A session of the file as it is, which ONNX Runtime optimizes and whose weights it maps."""
    options = _options(threads)
    maps = pass_linked_files(options, path.read_bytes(), path.parent, path.resolve().parent)
    session = onnxruntime.InferenceSession(path, options, providers=[*CPU])
    del maps  # the session has copied them
    return session


def _session(
    model: onnx.ModelProto, folder: Path, threads: int | None, *, optimized: bool = False, providers: Sequence[Any] = CPU
) -> onnxruntime.InferenceSession:
    """A session that keeps every cast, unless it is `optimized`: ONNX Runtime's optimizations would drop them."""
    options = _options(threads)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # In the order of the file: a node that measures a tensor runs before the tensor's memory is needed for others.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        # From the second run of a shape on, all intermediate tensors would share one block, beside the arena of the first run.
        options.enable_mem_pattern = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.log_severity_level = 3
    content = model.SerializeToString()
    maps = pass_linked_files(options, content, folder)
    session = onnxruntime.InferenceSession(content, options, providers=[*providers])
    del maps  # the session has copied them
    return session


def _wide(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    return dict(_matched(session, feeds))


def _matched(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for value in session.get_inputs():
        array = feeds[value.name]
        yield value.name, array.astype(np.float32) if value.type == "tensor(float)" else array
