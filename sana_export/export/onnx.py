"""One torch module to one ONNX file, and the checks that the file is what was meant."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import torch
from onnx import TensorProto
from torch import Tensor, nn

from sana_export.contract import GraphSpec
from sana_export.errors import ParityError
from sana_export.export.evaluator import StorageEvaluator
from sana_export.export.modules import CHECK_SIZES, TRACE_SIZES, random_inputs
from sana_export.export.parity import compare_tensors

OPSET = 20
DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}


def export_onnx(module: nn.Module, spec: GraphSpec, path: Path) -> None:
    """Trace `module` and write `path` with its weights in one external file beside it (`<name>.data`).

    Dynamic axes carry the contract's names. Nothing of the tracing machine (paths, stack traces) stays in the file.
    """
    inputs = random_inputs(spec, TRACE_SIZES, seed=0)
    shapes = tuple(
        {index: torch.export.Dim(axis, min=1, max=1 << 20) for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in spec.inputs
    )
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns the program
    model = program.model
    model.graph.name = spec.name
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        value.shape = onnx_ir.Shape(tensor.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)


def check_onnx(path: Path, spec: GraphSpec) -> onnx.ModelProto:
    """Run onnx.checker and compare names, dtypes and axes with the contract. Returns the model without its external data."""
    onnx.checker.check_model(path, full_check=False)
    model = onnx.load(path, load_external_data=False)
    for kind, found, wanted in (
        ("input", model.graph.input, spec.inputs),
        ("output", model.graph.output, spec.outputs),
    ):
        described = [_describe(value) for value in found]
        expected = [(tensor.name, DTYPES[tensor.dtype], tensor.shape) for tensor in wanted]
        if described != expected:
            raise ParityError(f"{path} has other {kind}s than its contract", found=described, wanted=expected)
    return model


def check_values(path: Path, module: nn.Module, spec: GraphSpec, precision: str) -> None:
    """Compare the file, run with every intermediate stored in its own dtype, with the torch module.

    Once on fresh random inputs of other sizes than the traced ones, once on zeros, which show an epsilon that got lost. Raises
    ParityError past the limit of parity.COSINE_LIMITS.
    """
    evaluator = StorageEvaluator(path)
    random = random_inputs(spec, CHECK_SIZES, seed=1)
    zeros = {name: torch.zeros_like(value) for name, value in random.items()}
    for kind, inputs in (("random", random), ("zero", zeros)):
        with torch.no_grad():
            outputs = module(*inputs.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = evaluator.run({name: to_numpy(value) for name, value in inputs.items()})
        for tensor, wanted in zip(spec.outputs, outputs, strict=True):
            parity = compare_tensors(f"{spec.name}.{tensor.name}", found[tensor.name], to_numpy(wanted), precision)
            if not parity.passed:
                raise ParityError(
                    f"{path} differs on {kind} inputs from the graph that it was exported from",
                    found=f"cosine {parity.cosine:.9f}, largest difference {parity.max_abs:.3g} in {parity.name}",
                    wanted=parity.limit,
                )


def to_numpy(value: Tensor) -> npt.NDArray[Any]:
    """As numpy; bfloat16, which numpy does not have, as float32 of the same values."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def external_files(model: onnx.ModelProto) -> list[str]:
    """The locations of all external data that the model names."""
    return sorted(
        {
            entry.value
            for tensor in onnx.external_data_helper._get_all_tensors(model)
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )


def parameter_count(model: onnx.ModelProto) -> int:
    """Numbers in all initializers."""
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)


def _describe(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[str | int, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return value.name, tensor.elem_type, shape


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of operators of packages that are not installed and of its own internals; neither is for users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
