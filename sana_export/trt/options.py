"""What an engine is built with beyond its graph, target and shape ranges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

#: The builder's flags of an option. A refittable engine holds no weights but those inside the ONNX file: exactly the external ones
#: are marked and stripped.
BUILDER_FLAGS = {
    "refittable": ("REFIT_INDIVIDUAL", "STRIP_PLAN"),
    "version_compatible": ("VERSION_COMPATIBLE",),
    "weight_streaming": ("WEIGHT_STREAMING",),
}


@dataclass(frozen=True)
class BuildOptions:
    """What changes an engine beyond its graph, target and ranges.

    `tf32`: fp32 products may run as TensorFloat-32 (10 bits of mantissa). TensorRT allows it unless told otherwise;
    here it is off, since fp32 in a graph of ours stands where fp16 is not enough.
    `refittable`: the engine is built without the graph's external weights and is given them after it is loaded
    (`refit.EngineWeights`), so that it serves every checkpoint of one structure. TensorRT-RTX 1.4 to 1.7 need a GPU to build one.
    `version_compatible`: it also runs on later versions of the same major one. `hardware_compatible`: it also runs on later GPUs,
    from compute capability 8.0 on. `weight_streaming`: its weights may stay on the host and come as they are needed.
    """

    tf32: bool = False
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False

    def recorded(self) -> dict[str, bool]:
        """What of this is part of an engine's key: `tf32`, and the others only where they are asked for."""
        asked = {field.name: True for field in dataclasses.fields(self) if getattr(self, field.name)}
        return {"tf32": self.tf32, **asked}


DEFAULT_OPTIONS = BuildOptions()
