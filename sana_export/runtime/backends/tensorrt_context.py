"""Execution contexts, which run an engine, and the memory that all of them work in.

NVIDIA's rule for captured work (TensorRT's documentation, "CUDA Graphs"): it belongs to one state of the context that it was
captured from, and running it after the context was changed is undefined behavior. The best practice is one context for each
captured graph, with memory that all contexts share. The addresses of inputs and outputs are part of the captured work. So each
captured loop has contexts of its own, whose shapes never change, and all contexts work in one block.
"""

from __future__ import annotations

from collections.abc import Mapping

from sana_export.errors import DependencyError
from sana_export.runtime.backends.cuda import Device, Memory
from sana_export.runtime.backends.device_arrays import DeviceArray
from sana_export.runtime.backends.tensorrt_engine import LoadedEngine


class SharedMemory:
    """The block of device memory that all contexts use for activations. It grows to the size that the largest run needs."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        #: The number of times that the block has moved.
        self.generation = 0

    def reserve(self, size: int) -> Memory:
        """The block, with at least `size` bytes. May move it."""
        if self._memory is None or self._memory.size < size:
            self.release()  # before allocating the new one
            self._memory = self._device.allocate(size)
        return self._memory

    def release(self) -> None:
        """Free the block. The next run allocates another one."""
        self._memory = None
        self.generation += 1


class EngineContext:
    """One execution context of `engine`. It is made with the engine's weights as they are now, and keeps the engine loaded."""

    def __init__(self, engine: LoadedEngine, device: Device, memory: SharedMemory) -> None:
        self._engine, self._device, self._memory = engine, device, memory
        self._context = engine.create_context()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._needed = 0
        self._generation = -1
        # Where a context that captures its own work finds its inputs and leaves its outputs, by tensor.
        self._buffers: dict[str, Memory] = {}

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shapes of all inputs and reserve the memory that a run needs."""
        if shapes != self._shapes:
            self._shapes = {}  # if one is refused, the context has a mix of old and new ones
            self._buffers.clear()
            self._device.enter()
            with self._engine.logger.collect() as log:
                refused = [name for name, shape in shapes.items() if not self._context.set_input_shape(name, shape)]
                if refused:
                    raise self._engine.failed("shaping " + ", ".join(f"{name} {shapes[name]}" for name in refused), log)
                self._needed = self._context.update_device_memory_size_for_shapes()
                if self._needed == 0 and log.errors:  # some graphs need none
                    raise self._engine.failed("sizing the memory of", log)
            if self._engine.streams:  # what weights are streamed through is part of this size alone
                self._needed = max(self._needed, self._engine.engine.device_memory_size_v2)
            self._shapes = dict(shapes)
            self._generation = -1
        if self._generation != self._memory.generation:
            try:
                block = self._memory.reserve(self._needed)
            except DependencyError as error:
                raise self._engine.out_of_memory("running", error.found) from error
            self._context.set_device_memory(block.address, block.size)
            self._generation = self._memory.generation

    def output_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output for the current shapes of the inputs."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Enqueue one run. The tensors have the current shapes."""
        tensors = {**inputs, **outputs}
        if not self._engine.settings.cuda_graph:
            self._enqueue({name: tensor.address for name, tensor in tensors.items()})
            return
        # The context captures its work again whenever an address changes, so it always gets the same ones.
        for name in tensors.keys() - self._buffers.keys():
            self._buffers[name] = self._device.allocate(tensors[name].nbytes)
        for name, tensor in inputs.items():
            self._device.copy(self._buffers[name].address, tensor.address, tensor.nbytes)
        self._enqueue({name: buffer.address for name, buffer in self._buffers.items()})
        for name, tensor in outputs.items():
            self._device.copy(tensor.address, self._buffers[name].address, tensor.nbytes)

    @property
    def capturable(self) -> bool:
        """Whether a run can be captured in a CUDA graph. TensorRT, which has no such question, can unless weights are streamed."""
        if self._engine.streams:
            return False
        if not hasattr(self._context, "is_stream_capturable"):
            return True
        return bool(self._context.is_stream_capturable(self._device.stream))

    def _enqueue(self, addresses: Mapping[str, int]) -> None:
        self._device.enter()
        with self._engine.logger.collect() as log:
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self._engine.failed(f"binding {name} of", log)
            if not self._context.execute_async_v3(self._device.stream):
                raise self._engine.failed("running", log)
