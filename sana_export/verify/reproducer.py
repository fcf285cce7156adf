"""A small ONNX file with inputs that shows where a graph begins to drift, for `polygraphy run`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_tensor

from sana_export.contract import GraphSpec, TensorSpec
from sana_export.export.evaluator import TensorEvaluator
from sana_export.files import locked
from sana_export.formats.arrays import Array
from sana_export.formats.dtypes import DTYPES
from sana_export.output_folder import OutputFolder
from sana_export.user_paths import user_path
from sana_export.verify.graph_file import GraphFile
from sana_export.verify.graph_layers import TensorOrigin
from sana_export.verify.layer_report import LayerReport, Reproducer
from sana_export.verify.layer_sides import SideChoice, float32_side
from sana_export.verify.layer_tensors import compare
from sana_export.verify.polygraphy_package import save_inputs, save_outputs
from sana_export.verify.recorded_inputs import stored

MODEL, REFERENCE, INPUTS, OUTPUTS, REPORT = "model.onnx", "reference.onnx", "inputs.json", "outputs.json", "report.json"


def reproducer_folder(folder: Path) -> OutputFolder:
    """Where a reproducer is written. Raises UsageError if the folder has other files in it."""
    place = OutputFolder.of(user_path(folder, "--reproducer"))
    place.check_replaceable(REPORT, "a reproducer", "--reproducer")
    return place


def save_reproducer(
    folder: Path,
    graph: GraphFile,
    reference: GraphFile,
    origins: Sequence[TensorOrigin],
    feeds: Mapping[str, Array],
    report: LayerReport,
    second: SideChoice,
) -> LayerReport:
    """Save the part of a graph that computes the first tensor that drifts from what enters its layer.

    The folder gets the part with its weights, its inputs in float32 arithmetic rounded to their dtypes, its output in float32
    arithmetic from these, and the report, which is returned. If the reference is another bundle's graph, also the reference's part.
    Raises UsageError if the folder has other files in it.
    """
    assert report.first is not None
    place = reproducer_folder(folder)
    origin = report.first.origin
    borders = layer_borders(graph.model, {item.tensor: item for item in origins}, origin.tensor)
    values = _values(reference, borders, feeds, second.threads)
    part = extract(graph, values, origin.tensor)
    spec = GraphSpec("part", tuple(TensorSpec(item.name, _dtype(item), values[item.name].shape) for item in part.graph.input), ())
    inputs = {tensor.name: stored(values[tensor.name], tensor.dtype) for tensor in spec.inputs}
    with locked(place.lock, remove=True), place.written(last=REPORT) as partial:
        _save(part, partial / MODEL)
        if reference is not graph:
            _save(extract(reference, values, origin.tensor), partial / REFERENCE)
        wanted_path = partial / (MODEL if reference is graph else REFERENCE)
        sides = float32_side(wanted_path, second.threads), second.side(partial / MODEL, spec, inputs)
        wanted, found = (side.compute([origin.tensor]).run(inputs) for side in sides)
        (row,) = compare([origin], wanted, found, report.limit_db)
        save_inputs(partial / INPUTS, spec, inputs)
        save_outputs(partial / OUTPUTS, report.sides[0], wanted)
        saved = Reproducer(str(folder), len(part.graph.node), row.snr_db, not row.passed, _command(folder, report, second))
        report = replace(report, reproducer=saved)
        (partial / REPORT).write_text(json.dumps(report.as_json(), indent=1), "utf-8")
    return report


def _save(part: onnx.ModelProto, path: Path) -> None:
    onnx.save(part, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def layer_borders(model: onnx.ModelProto, origins: Mapping[str, TensorOrigin], tensor: str) -> list[str]:
    """The tensors that enter the layer of `tensor` on the way to it, in the order of the file.

    Numbers that are not floats, such as shapes, count as entering: they follow from the inputs' shapes.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    weights = {initializer.name for initializer in model.graph.initializer}
    layer = origins[tensor].layer
    pending, seen, borders = [tensor], {tensor}, set[str]()
    while pending:
        name = pending.pop()
        if name in origins and origins[name].layer == layer:
            new = {item for item in producers[name].input if item and item not in weights} - seen
            seen |= new
            pending += new
        else:
            borders.add(name)
    order = [value.name for value in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [name for name in order if name in borders]


def _values(graph: GraphFile, names: Sequence[str], feeds: Mapping[str, Array], threads: int | None) -> dict[str, Array]:
    """The values of tensors in float32 arithmetic."""
    computed = [name for name in names if name not in feeds]
    values = TensorEvaluator(graph.path, computed, threads, arithmetic="float32").run(feeds) if computed else {}
    return {name: feeds[name] if name in feeds else values[name] for name in names}


def extract(graph: GraphFile, values: Mapping[str, Array], tensor: str) -> onnx.ModelProto:
    """The part of a graph that computes `tensor` from tensors with known `values`, with its weights.

    Floats become inputs of fixed shape. All other values become constants.
    """
    part = onnx.utils.Extractor(graph.model).extract_model([*values], [tensor])
    del part.graph.value_info[:]
    for initializer in part.graph.initializer:
        if initializer.external_data:
            load_external_data_for_tensor(initializer, str(graph.path.parent))
            initializer.data_location = onnx.TensorProto.DEFAULT
            del initializer.external_data[:]
    entering = [*part.graph.input]
    del part.graph.input[:]
    for value in entering:
        array = values[value.name]
        if array.dtype.kind == "f":
            kind = value.type.tensor_type.elem_type
            part.graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind, array.shape))
        else:
            part.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    return part


def _dtype(value: onnx.ValueInfoProto) -> str:
    return next(dtype.name for dtype in DTYPES.values() if dtype.onnx == value.type.tensor_type.elem_type)


def _command(folder: Path, report: LayerReport, second: SideChoice) -> str:
    """The command that runs the part with Polygraphy and compares it with the saved output."""
    words = ["polygraphy", "run", str(folder / MODEL), *second.runner]
    words += ["--load-inputs", str(folder / INPUTS), "--load-outputs", str(folder / OUTPUTS)]
    words += ["--compare", "snr", "--snr-threshold", f"{report.limit_db:.1f}"]
    return second.environment + shlex.join(words)
