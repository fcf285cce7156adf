"""One engine in PyTorch's memory, for checks and profiles that do without the runtime's device layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sana_export.contract import GraphSpec


class Refused(Exception):
    """The library refused a call. `str()` says what it was doing, for example "shaping latents (1, 32, 8, 8) of"."""


@dataclass(frozen=True, eq=False)
class BoundEngine:
    """A context whose tensors are on the GPU. They live as long as this object."""

    #: The module's execution context.
    context: Any
    #: Inputs and outputs by name.
    tensors: Mapping[str, Any]
    #: The memory that the context works in: an engine may require that it allocates none itself.
    memory: Any


def bind(module: Any, engine: Any, spec: GraphSpec, inputs: Mapping[str, Any]) -> BoundEngine:
    """A context of `engine` with `inputs`, tensors on the GPU, and new tensors for the outputs. Raises Refused."""
    import torch

    context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is None:
        raise Refused("creating a context of")
    tensors = dict(inputs)
    for name, tensor in inputs.items():
        if not context.set_input_shape(name, tuple(tensor.shape)):
            raise Refused(f"shaping {name} {tuple(tensor.shape)} of")
    device = next(iter(inputs.values())).device
    memory = torch.empty(max(context.update_device_memory_size_for_shapes(), 1), dtype=torch.uint8, device=device)
    context.set_device_memory(memory.data_ptr(), memory.numel())
    for output in spec.outputs:
        shape = tuple(context.get_tensor_shape(output.name))
        tensors[output.name] = torch.zeros(shape, dtype=getattr(torch, output.dtype), device=device)
    for name, tensor in tensors.items():
        if not context.set_tensor_address(name, tensor.data_ptr()):
            raise Refused(f"binding {name} of")
    return BoundEngine(context, tensors, memory)
