"""A bundle among the models that ComfyUI manages: loaded when a node needs it, closed when ComfyUI needs its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import open_backend


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA that a node adds."""

    path: str
    strength: float
    #: Time and size of the file. If it is saved again, it is loaded again.
    stamp: tuple[int, int]


class SanaWeights(torch.nn.Module):
    """Stands for the weights, which PyTorch does not have. ComfyUI's log has its name."""


class ManagedBundle(comfy.model_patcher.ModelPatcher):
    """A bundle's place in `comfy.model_management`. The weights are the runtime's own: ComfyUI only says when.

    ComfyUI calls `partially_load` to load a model and `detach` to unload it, because another one needs its memory, or because the
    user asked for it. A bundle that was unloaded is loaded again when the next node needs it.
    """

    def __init__(self, bundle: Path, options: Mapping[str, Any], size: int, device: str) -> None:
        """`options` are those of `SanaRuntime.from_pretrained`, `size` is that of the weights in bytes.

        `device` is where the backend computes, "cpu" or "cuda". On the CPU the bundle claims no memory of ComfyUI's GPU.
        """
        self.runtime: SanaRuntime | None = None
        self._bundle, self._options = bundle, options
        #: Those that are loaded. None: unknown, because one could not be loaded.
        self._loras: tuple[ChosenLora, ...] | None = ()
        cpu = torch.device("cpu")
        super().__init__(SanaWeights(), cpu if device == "cpu" else comfy.model_management.get_torch_device(), cpu, size=size)

    def open(self, loras: tuple[ChosenLora, ...]) -> SanaRuntime:
        """The runtime with these LoRAs. ComfyUI unloads other models first if they are in its way.

        Raises the errors of `SanaRuntime.from_pretrained` and of its `load_lora`.
        """
        comfy.model_management.load_models_gpu([self])
        runtime = self._loaded()
        if loras != self._loras:
            self._loras = None
            runtime.unload_lora()
            for lora in loras:
                runtime.load_lora(lora.path, lora.strength)
            self._loras = loras
        return runtime

    def _loaded(self) -> SanaRuntime:
        if self.runtime is None:
            comfy.model_management.soft_empty_cache()  # what PyTorch keeps for itself counts as free there, but is not
            self.runtime, self._loras = SanaRuntime.from_pretrained(self._bundle, **self._options), ()
        return self.runtime

    def loaded_size(self) -> int:
        return self.model_size() if self.runtime is not None else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.runtime is not None else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        before = self.loaded_size()
        self._loaded()
        return self.loaded_size() - before

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *_: Any, **__: Any) -> int:
        return 0  # all or nothing: ComfyUI calls `detach` next

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """Close the runtime. ComfyUI also calls this with False, for a model that stays loaded and only changes its place."""
        if unpatch_all and self.runtime is not None:
            runtime, self.runtime = self.runtime, None
            runtime.close()
        return self.model


@dataclass(frozen=True)
class SanaBundle:
    """What nodes pass on: a bundle, and the LoRAs to draw with."""

    model: ManagedBundle
    loras: tuple[ChosenLora, ...] = ()

    @classmethod
    def load(cls, bundle: Path, backend: str, memory: str) -> SanaBundle:
        """Load the bundle in a folder. `backend` and `memory` are those of `SanaRuntime.from_pretrained`, and so are the errors."""
        manifest = Manifest.load(bundle)
        weights = {file.path: file.bytes for graph in manifest.graphs.values() for file in graph.files}  # graphs share files
        device = open_backend(backend, bundle, manifest).device  # this loads no graph
        loaded = cls(ManagedBundle(bundle, {"backend": backend, "memory": memory}, sum(weights.values()), device))
        loaded.open()
        return loaded

    def with_lora(self, lora: ChosenLora) -> SanaBundle:
        """This with one LoRA more."""
        return replace(self, loras=(*self.loras, lora))

    def open(self) -> SanaRuntime:
        """The runtime, loaded, with the LoRAs."""
        return self.model.open(self.loras)
