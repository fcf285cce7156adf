"""A bundle's graph in PyTorch, with the quantized weights that the bundle stores."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.commands import repair_command
from sana_export.graphs.builders import build_graph
from sana_export.graphs.fp8_product import has_kernel
from sana_export.graphs.products import product_form
from sana_export.graphs.quantized_tensor import Layout, QuantizedTensor
from sana_export.manifest import Manifest
from sana_export.runtime.backends.quantized_weights import StoredLayer, read_quantized

log = logging.getLogger(__name__)


def stored_graph(bundle: Path, manifest: Manifest, checkpoint: SanaCheckpoint, graph: str, device: str) -> nn.Module:
    """A graph of the checkpoint on `device`, with the bundle's quantized layers.

    On a GPU these weights stay quantized, to save memory. On a CPU they are widened once, to save time. Raises ArtifactError if
    the files with these weights are damaged.
    """
    module, entry = build_graph(graph, checkpoint, manifest.options), manifest.graphs[graph]
    if entry.quantized:
        owners = _owners(module)
        for layer in read_quantized(bundle, entry, manifest.options.dtype, fix=repair_command(bundle, manifest)):
            replaced = module.get_parameter(layer.weight.name)
            weight = _on_gpu(layer, replaced, torch.device(device)) if device != "cpu" else _on_cpu(layer, replaced)
            for owner, name in owners[id(replaced)]:
                setattr(owner, name, nn.Parameter(weight, requires_grad=False))
        in_fp8 = sum(isinstance(weight, QuantizedTensor) and weight.stored_as.kernel for weight in module.parameters())
        if any(weight.inputs == "fp8" for weight in entry.quantized) and device != "cpu":
            log.info("%s: %d layers multiply in FP8, the others in %s", graph, in_fp8, manifest.options.dtype)
    return module.to(device)


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The id of each parameter of `module` to the modules that have it, and its name there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((owner, name))
    return found


def _on_cpu(layer: StoredLayer, replaced: Tensor) -> Tensor:
    numbers, parts = _tensor(layer.numbers(tuple(replaced.shape)), replaced.dtype), _parts(layer, replaced.dtype)
    if not parts:
        return numbers
    return QuantizedTensor(numbers, numbers, Layout("", tuple(numbers.shape), inputs=layer.weight.inputs), replaced.shape, parts)


def _on_gpu(layer: StoredLayer, replaced: Tensor, device: torch.device) -> Tensor:
    weight, dtype = layer.weight, replaced.dtype
    kernel = has_kernel(weight.inputs, weight.dtype, weight.shape, dtype, device)
    layout = Layout(weight.dtype, weight.shape, weight.axis, weight.block, weight.transposed, weight.inputs, kernel)
    numbers = torch.from_numpy(np.array(layer.stored)).to(device)
    if weight.dtype in ("int8", "fp8"):
        numbers = numbers.view(torch.int8 if weight.dtype == "int8" else torch.float8_e4m3fn).reshape(weight.shape)
    if kernel:
        numbers = numbers.T.contiguous().T  # the kernel reads the inputs of one output channel in a row
    parts = {name: tensor.to(device) for name, tensor in _parts(layer, dtype).items()}
    return QuantizedTensor(numbers, _tensor(layer.scales, dtype).to(device), layout, replaced.shape, parts)


def _parts(layer: StoredLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a `QuantizedTensor` beside its numbers and scales."""
    form = product_form(layer.weight, {end: _tensor(values, torch.float32) for end, values in layer.tensors.items()}, dtype)
    if form is None:
        return {}
    scale = torch.tensor(form.scale, dtype=torch.float32) if form.inputs else None
    parts = {"input_scale": scale, "factor": form.factor, "down": form.down, "up": form.up}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def _tensor(numbers: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(numbers)).to(dtype)
