"""How the engine backends run each graph: the defaults, and the `backend_options` that change them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sana_export.errors import UsageError

#: The default of the option `text_multiple`. A few more tokens cost almost nothing: the text encoder's time is that of reading its
#: weights, and the context is a small part of a step. In return, prompts of similar length have the same shapes, for which kernels
#: are compiled and loops captured once.
TEXT_MULTIPLE = 32


@dataclass(frozen=True)
class ContextSettings:
    """How TensorRT-RTX runs a graph. TensorRT has neither setting. The defaults follow NVIDIA's documentation, not measurements."""

    #: When kernels for new shapes are compiled: before a run ("EAGER"), while slower ones do the work ("LAZY"), or never ("NONE").
    specialization: str
    #: The context captures its own work as a CUDA graph.
    cuda_graph: bool = False


#: The runtime captures these graphs, with the kernels that exist at that time.
IN_THE_LOOP = {"denoiser", "sampler", "blend"}
#: Elsewhere nothing waits for a compiler. Any size of the final image is possible, and the graph that makes it is small: kernels
#: for each size would only fill the cache. No context captures its own work: it would do so again whenever an address changes, and
#: each run has new tensors.
_SPECIALIZATION = {**dict.fromkeys(IN_THE_LOOP, "EAGER"), "postprocess": "NONE"}

#: The options of each backend, and what they may be.
_RTX = {
    "cuda_graph_strategy": ("disabled", "whole_graph_capture"),
    "dynamic_shapes_kernel_specialization_strategy": ("lazy", "eager", "none"),
}
_CHOICES: dict[str, dict[str, tuple[str, ...]]] = {"tensorrt": {}, "tensorrt-rtx": _RTX}


@dataclass(frozen=True)
class EngineOptions:
    """The `backend_options` of an engine backend. Those of TensorRT-RTX have the names and values of its Python module."""

    #: The tokens of a prompt are padded to a multiple of this, in the text encoder and in the context.
    text_multiple: int = TEXT_MULTIPLE
    #: "whole_graph_capture": contexts outside the sampling loop capture their own work. They keep buffers for inputs and outputs.
    cuda_graph_strategy: str = "disabled"
    #: When kernels outside the sampling loop are compiled for new shapes: "lazy", "eager" or "none". None: as each graph's default.
    dynamic_shapes_kernel_specialization_strategy: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any], backend: str) -> EngineOptions:
        """The options that a caller gave. Raises UsageError for unknown ones and for values that they cannot have."""
        choices = _CHOICES[backend]
        for name, value in options.items():
            if name == "text_multiple":
                possible = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                wanted = "an integer, 1 or more"
            elif name in choices:
                possible, wanted = value in choices[name], ", ".join(choices[name])
            else:
                known = ", ".join(("text_multiple", *choices))
                raise UsageError(f"unknown backend option of {backend}", found=repr(name), wanted=known)
            if not possible:
                raise UsageError(f"the backend option {name} is out of range", found=repr(value), wanted=wanted)
        return cls(**options)

    def settings(self, graph: str) -> ContextSettings:
        """How the contexts of `graph` run."""
        settings = ContextSettings(_SPECIALIZATION.get(graph, "LAZY"))
        if graph in IN_THE_LOOP:
            return settings
        chosen = self.dynamic_shapes_kernel_specialization_strategy
        return replace(
            settings,
            specialization=chosen.upper() if chosen else settings.specialization,
            cuda_graph=self.cuda_graph_strategy == "whole_graph_capture",
        )
