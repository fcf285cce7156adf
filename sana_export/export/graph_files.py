"""The ONNX files of a bundle. Graphs that share weights are in one folder and read one weight file."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.contract import WEIGHTS_OF, GraphSpec
from sana_export.export.example_inputs import CHECK_SIZES, TRACE_SIZES, fitting, graph_spec
from sana_export.export.mapped_pages import returning_pages
from sana_export.export.onnx import (
    OPSET,
    Example,
    check_onnx,
    check_targets,
    check_values,
    export_onnx,
    parameter_count,
    run_module,
)
from sana_export.export.quantize.statistics import CalibrationFile
from sana_export.export.quantize.weights import StoredWeight, built, compute_stored
from sana_export.files import file_entry
from sana_export.formats.onnx_weights import external_locations
from sana_export.graphs.builders import lora_targets
from sana_export.graphs.storage import WeightFile
from sana_export.manifest import GraphEntry, LoraTarget, Options, QuantizedWeight
from sana_export.quantization.schemes import SCHEMES


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The graphs `names`, grouped by the graph whose folder and weight file they share (contract.WEIGHTS_OF)."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(WEIGHTS_OF.get(name, name), []).append(name)
    return found


def export_graphs(
    owner: str,
    names: Iterable[str],
    checkpoint: SanaCheckpoint,
    options: Options,
    bundle: Path,
    calibration: CalibrationFile | None = None,
) -> dict[str, GraphEntry]:
    """Export graphs that share the weight file of `owner` into `bundle`, check each, and return their entries."""
    folder = bundle / "onnx" / owner
    shutil.rmtree(folder, ignore_errors=True)
    exported: dict[str, tuple[GraphSpec, onnx.ModelProto, tuple[LoraTarget, ...], tuple[QuantizedWeight, ...]]] = {}
    scheme = options.scheme(owner)
    with WeightFile(folder / "model.onnx.data") as weights:
        for name in names:
            spec, path = graph_spec(name, checkpoint, options), folder / onnx_name(name)
            with built(name, checkpoint, options, weights, calibration) as (module, stored):
                opset = OPSET if scheme is None else SCHEMES[scheme].opset
                export_onnx(module, spec, path, weights, fitting(TRACE_SIZES, name, checkpoint), quantized=stored, opset=opset)
                model, targets = check_onnx(path, spec), lora_targets(name, checkpoint, options)
                check_targets(path, model, targets, stored)
                exported[name] = spec, model, targets, tuple(place.weight for place in stored.values())
                examples: dict[int | None, list[Example]] = {}
                for bits in _input_bits(stored):
                    compute_stored(module, stored, weights, round_inputs=bits != 16)
                    with returning_pages(folder):
                        examples[bits] = run_module(module, spec, fitting(CHECK_SIZES, name, checkpoint))
            for bits, computed in examples.items():
                check_values(path, spec, computed, options.precision, input_bits=bits)
    data = (file_entry(bundle, weights.path),) if weights.bytes else ()
    if not data:
        weights.path.unlink()
    return {
        name: GraphEntry(
            spec,
            file_entry(bundle, folder / onnx_name(name)),
            data if external_locations((folder / onnx_name(name)).read_bytes()) else (),
            model.opset_import[0].version,
            parameter_count(model),
            targets,
            quantized,
        )
        for name, (spec, model, targets, quantized) in exported.items()
    }


def _input_bits(stored: Mapping[str, StoredWeight]) -> tuple[int | None, ...]:
    """The bits that inputs of layers are rounded to in each check of a file with these weights. 16: they are not. None: none is.

    Without rounding, the file has to equal its module as any other does. With rounding, an error of the last bit moves a value
    at the border between two steps by a whole step.
    """
    rounded = [place.weight.input_bits for place in stored.values() if place.weight.inputs]
    return (16, min(rounded)) if rounded else (None,)


def onnx_name(graph: str) -> str:
    """The file name of a graph in its folder: model.onnx, or for a part of another graph the name of the part."""
    owner = WEIGHTS_OF.get(graph)
    return f"{graph.removeprefix(f'{owner}_')}.onnx" if owner else "model.onnx"
