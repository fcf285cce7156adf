"""One torch module to one ONNX file, and the checks that the file is what was meant."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import torch
from torch import Tensor, nn

from sana_export.contract import GraphSpec
from sana_export.errors import ParityError
from sana_export.export.evaluator import StorageEvaluator
from sana_export.export.example_inputs import CHECK_SIZES, TRACE_SIZES, AxisSizes, random_inputs
from sana_export.export.half import WideProducts
from sana_export.export.mapped_pages import returning_pages
from sana_export.export.optimize import optimize
from sana_export.export.parity import compare_tensors
from sana_export.export.quantize.folding import fold_factors
from sana_export.export.quantize.graph import insert_dequantize
from sana_export.export.quantize.weights import StoredWeight
from sana_export.export.tracing import dynamic_shapes, trace
from sana_export.formats.dtypes import DTYPES
from sana_export.graphs.storage import WeightFile
from sana_export.manifest import LoraTarget

log = logging.getLogger(__name__)

OPSET = 20
#: Constants of up to this size stay in the ONNX file. Larger ones go to the weight file.
INLINE_BYTES = 1024
UNQUANTIZED: Mapping[str, StoredWeight] = MappingProxyType({})


def export_onnx(
    module: nn.Module,
    spec: GraphSpec,
    path: Path,
    weights: WeightFile,
    sizes: AxisSizes = TRACE_SIZES,
    *,
    quantized: Mapping[str, StoredWeight] = UNQUANTIZED,
    opset: int = OPSET,
) -> None:
    """Trace `module`, whose parameters are in `weights`, and write the ONNX file `path`, which reads them from that file.

    Of the parameters in `quantized`, by name, the file has integers and scales. `opset` is the least version of the operator set.

    Dynamic axes have the contract's names. The file contains nothing of the machine that traced it (paths, stack traces). Small
    constants from the trace stay in it; large ones are added to `weights`. The trace runs at `sizes`.
    """
    inputs = random_inputs(spec, sizes, seed=0)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            trace(module, spec, inputs, sizes.least(spec)),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(spec, sizes.least(spec)),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns the program
    model = program.model
    optimize(model)
    model.graph.name = spec.name
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        value.shape = onnx_ir.Shape(tensor.shape)
    insert_dequantize(model, quantized, weights.path)
    fold_factors(model.graph, quantized)
    # Up to 23, the versions after OPSET only allow more types.
    model.graph.opset_imports[""] = max(OPSET, opset)
    _point_to(weights, model, dict(module.named_parameters(remove_duplicate=False)))
    onnx_ir.save(model, path)


def _point_to(weights: WeightFile, model: onnx_ir.Model, parameters: Mapping[str, Tensor]) -> None:
    """Make the model's initializers refer to their values in `weights`."""
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        assert constant is not None  # a traced graph has no initializer without a value
        if isinstance(constant, onnx_ir.ExternalTensor):
            continue
        place = weights.place(parameters[name]) if name in parameters else None
        if place is None and constant.nbytes > INLINE_BYTES:
            place = weights.append(np.frombuffer(constant.tobytes(), np.uint8))
        if place is not None:
            value.const_value = onnx_ir.ExternalTensor(
                weights.path.name,
                place.offset,
                place.length,
                constant.dtype,
                shape=constant.shape,  # type: ignore[arg-type]
                name=name,
                base_dir=weights.path.parent,
            )


def check_onnx(path: Path, spec: GraphSpec) -> onnx.ModelProto:
    """Run onnx.checker and compare names, dtypes and axes with the contract. Returns the model without its external data."""
    onnx.checker.check_model(path, full_check=False)
    model = onnx.load(path, load_external_data=False)
    for kind, found, wanted in (
        ("input", model.graph.input, spec.inputs),
        ("output", model.graph.output, spec.outputs),
    ):
        described = [_describe(value) for value in found]
        expected = [(tensor.name, DTYPES[tensor.dtype].onnx, tensor.shape) for tensor in wanted]
        if described != expected:
            raise ParityError(f"the {kind}s of {path} differ from its contract", found=described, wanted=expected)
    return model


def check_targets(path: Path, model: onnx.ModelProto, targets: Iterable[LoraTarget], quantized: Collection[str] = ()) -> None:
    """Raise ParityError unless each target is an external initializer of the model with its name, shape and dtype.

    Otherwise refitting it would change something else, or nothing. Weights in `quantized` take no LoRA after the export.
    """
    outside = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in model.graph.initializer if tensor.external_data}
    for target in targets:
        if target.initializer in quantized:
            continue
        wanted = (target.initializer_shape, DTYPES[target.dtype].onnx)
        if (found := outside.get(target.initializer)) != wanted:
            raise ParityError(
                f"{path} does not store {target.module} where its graph says",
                found=found or f"no external initializer {target.initializer}",
                wanted=wanted,
            )


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs of a module and what it computed from them."""

    #: "random" or "zero".
    kind: str
    inputs: Mapping[str, Tensor]
    #: In the order of the contract.
    outputs: tuple[Tensor, ...]


def run_module(module: nn.Module, spec: GraphSpec, sizes: AxisSizes = CHECK_SIZES) -> list[Example]:
    """Run `module` on random inputs of `sizes`, other than the traced ones, and on zeros, which show a lost epsilon."""
    random = random_inputs(spec, sizes, seed=1)
    examples = []
    for kind, inputs in (("random", random), ("zero", {name: torch.zeros_like(value) for name, value in random.items()})):
        with torch.no_grad(), WideProducts():
            outputs = module(**inputs)
        examples.append(Example(kind, inputs, outputs if isinstance(outputs, tuple) else (outputs,)))
    return examples


#: For what a deep graph can miss in fp32 without a fault (docs/quantization.md, "What is missing").
_FINE_FP4 = "export in fp16 (--dtype fp16), whose limit allows for FP4 turning errors of the last bit into whole steps"


def check_values(
    path: Path, spec: GraphSpec, examples: Iterable[Example], precision: str, *, input_bits: int | None = None
) -> None:
    """Compare the file, run with every intermediate stored in its own dtype, with the module's outputs.

    `input_bits`, for a file with layers that round their inputs: the bits that the module rounded them to, 16 if it did not.

    Raises ParityError if a limit of parity.COSINE_LIMITS is missed.
    """
    evaluator, least = StorageEvaluator(path, round_inputs=input_bits != 16), 1.0
    for example in examples:
        with returning_pages(path.parent):
            found = evaluator.run({name: to_numpy(value) for name, value in example.inputs.items()})
        for tensor, wanted in zip(spec.outputs, example.outputs, strict=True):
            name = f"{spec.name}.{tensor.name}"
            parity = compare_tensors(name, found[tensor.name], to_numpy(wanted), precision, input_bits=input_bits or 16)
            if not parity.passed:
                raise ParityError(
                    f"{path} differs on {example.kind} inputs from the graph that it was exported from",
                    found=f"cosine {parity.cosine:.9f}, largest difference {parity.max_abs:.3g} in {parity.name}",
                    wanted=parity.limit,
                    fix=_FINE_FP4 if (precision, input_bits) == ("fp32", 4) else None,
                )
            least = min(least, parity.cosine)
    log.info("%s: the file equals its module, cosine %.9f", spec.name, least)


def to_numpy(value: Tensor) -> npt.NDArray[Any]:
    """The tensor as a numpy array; bfloat16, which numpy does not have, as float32 with the same values."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def parameter_count(model: onnx.ModelProto) -> int:
    """The number of parameters in all initializers."""
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
