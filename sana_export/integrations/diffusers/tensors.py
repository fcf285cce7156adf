"""Tensors of PyTorch as inputs of a backend, and its outputs as tensors of PyTorch, without a copy where both are in one memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sana_export.formats.dtypes import DTYPES
from sana_export.runtime.backends.base import Backend, DeviceTensor
from sana_export.runtime.backends.cuda import ALIGNMENT, Memory
from sana_export.runtime.backends.device_arrays import DeviceArray
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from sana_export.runtime.backends.tensorrt import TensorRTBackend

#: numpy and CUDA have no bfloat16. Its bits travel as integers.
_BITS = {"bfloat16": "<i2"}
_BY_ONNX = {dtype.onnx: dtype.name for dtype in DTYPES.values()}


class Exchange(ABC):
    """How tensors get from PyTorch into a backend and back."""

    #: Where tensors of PyTorch have to be, so that they need no copy.
    device: torch.device

    def give(self, tensor: Tensor, dtype: str = "float32") -> Any:
        """`tensor` as an input of a session, in the contract's `dtype`."""
        return self._given(tensor.detach().to(self.device, getattr(torch, dtype)).contiguous())

    @abstractmethod
    def _given(self, tensor: Tensor) -> Any: ...

    @abstractmethod
    def take(self, value: DeviceTensor) -> Tensor:
        """A session's output as a tensor on `device`. It may share the memory."""


class HostExchange(Exchange):
    """Through arrays in the host's memory: without a copy on a CPU, with one if PyTorch does not reach the backend's GPU."""

    device = torch.device("cpu")

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def _given(self, tensor: Tensor) -> Any:
        return tensor.numpy()

    def take(self, value: DeviceTensor) -> Tensor:
        array = self._backend.to_host(value)
        return torch.from_numpy(array if array.flags.writeable else array.copy())


class TorchExchange(Exchange):
    """For a backend whose tensors are PyTorch's."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def _given(self, tensor: Tensor) -> Tensor:
        return tensor

    def take(self, value: Tensor) -> Tensor:
        return value


class Order(Protocol):
    """Puts the work of two streams on one device in order."""

    def before(self, tensor: Tensor) -> None:
        """The backend's next work waits for PyTorch's so far. It reads `tensor`, whose memory must last until then."""
        ...

    def after(self) -> None:
        """PyTorch's next work waits for the backend's so far."""
        ...


class StreamOrder:
    """For a backend with a stream of its own, by its handle."""

    def __init__(self, stream: int, device: torch.device) -> None:
        self._stream = torch.cuda.ExternalStream(stream, device=device)
        self._device = device

    def before(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)

    def after(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class PointerExchange(Exchange):
    """By addresses, for backends of engines."""

    def __init__(self, device: torch.device, order: Order) -> None:
        self.device, self._order = device, order

    def _given(self, tensor: Tensor) -> DeviceArray:
        if tensor.data_ptr() % ALIGNMENT:  # a part of another tensor
            tensor = aligned_copy(tensor)
        self._order.before(tensor)
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        memory = Memory(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor)
        return DeviceArray(memory.address, shape, dtype, memory)

    def take(self, value: DeviceArray) -> Tensor:
        self._order.after()
        return tensor_at(value.address, value.shape, value.dtype, value, self.device)


class OrtExchange(Exchange):
    """By DLPack and addresses, for ONNX Runtime on a GPU. A run of it waits for its own work; it has to wait for PyTorch's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _given(self, tensor: Tensor) -> Any:
        import onnxruntime

        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return onnxruntime.OrtValue.from_dlpack(tensor)

    def take(self, value: Any) -> Tensor:
        return tensor_at(value.data_ptr(), tuple(value.shape()), _BY_ONNX[value.element_type()], value, self.device)


class ForeignMemory:
    """Memory that another library owns, as numpy and PyTorch read it. Whatever shares it keeps `owner` alive."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str, owner: Any, device: str) -> None:
        self.owner = owner
        interface = {"shape": shape, "typestr": typestr, "data": (address, False), "version": 3}
        setattr(self, "__cuda_array_interface__" if device == "cuda" else "__array_interface__", interface)


def aligned_copy(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor at an address that an engine can read."""
    size = tensor.numel() * tensor.element_size()
    block = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=tensor.device)
    start = -block.data_ptr() % ALIGNMENT
    return block[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def tensor_at(address: int, shape: tuple[int, ...], dtype: str, owner: Any, device: torch.device) -> Tensor:
    """The tensor at an address of `device`, in the memory of `owner`. `dtype` is the contract's name."""
    memory = ForeignMemory(address, shape, _BITS.get(dtype, DTYPES[dtype].numpy), owner, device.type)
    tensor = torch.as_tensor(memory, device=device) if device.type == "cuda" else torch.from_numpy(np.asarray(memory))
    return tensor.view(torch.bfloat16) if dtype in _BITS else tensor


def exchange_with(backend: Backend) -> Exchange:
    """How tensors get from PyTorch into `backend` and back."""
    on_gpu = backend.device == "cuda" and torch.cuda.is_available()
    if (own := getattr(backend, "torch_device", None)) is not None:
        return TorchExchange(str(own))
    if on_gpu and isinstance(backend, TensorRTBackend):
        device = torch.device("cuda", backend.index)
        return PointerExchange(device, StreamOrder(backend.gpu.stream, device))
    if on_gpu and isinstance(backend, OnnxRuntimeBackend):
        return OrtExchange(torch.device("cuda", backend.index))
    return HostExchange(backend)
