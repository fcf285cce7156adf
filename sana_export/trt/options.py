"""The options of an engine beyond its graph, target and shape ranges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

#: The builder's flags for every engine, if the module has them. Without REQUIRE_USER_ALLOCATION an engine of TensorRT-RTX may
#: allocate memory while it runs, which cannot be captured in a CUDA graph. One that can stream its weights always does.
FLAGS = ("REQUIRE_USER_ALLOCATION",)
#: The preview features for every engine, if the module has them. With RUNTIME_ACTIVATION_RESIZE_10_10 a context works in the memory
#: that its current shapes need, not in what the largest shapes of its profile need.
PREVIEW_FEATURES = ("RUNTIME_ACTIVATION_RESIZE_10_10",)
#: The builder's flags for each option. A refittable engine has only the weights inside the ONNX file: all external weights are
#: marked as refittable and left out.
BUILDER_FLAGS = {
    "refittable": ("REFIT_INDIVIDUAL", "STRIP_PLAN"),
    "version_compatible": ("VERSION_COMPATIBLE",),
    "weight_streaming": ("WEIGHT_STREAMING",),
}


@dataclass(frozen=True)
class BuildOptions:
    """What changes an engine beyond its graph, target and ranges."""

    #: fp32 products may run as TensorFloat-32, which has 10 bits of mantissa. TensorRT allows it by default. Our default is off,
    #: because our graphs use fp32 only if fp16 is not enough.
    tf32: bool = False
    #: The engine is built without the graph's external weights and gets them after loading, so it works for every checkpoint of
    #: the same structure. TensorRT-RTX 1.4 to 1.7 need a GPU to build one.
    refittable: bool = False
    #: The engine also runs on later versions with the same major version.
    version_compatible: bool = False
    #: The engine also runs on later GPUs, from compute capability 8.0 on.
    hardware_compatible: bool = False
    #: The engine's weights can stay in host memory and be copied to the GPU as they are needed. Then its work is not captured.
    weight_streaming: bool = False

    def recorded(self) -> dict[str, bool]:
        """The options that are part of an engine's key: `tf32`, and the others if they are on."""
        enabled = {field.name: True for field in dataclasses.fields(self) if getattr(self, field.name)}
        return {"tf32": self.tf32, **enabled}


DEFAULT_OPTIONS = BuildOptions()
#: The fields of `BuildOptions` that are options of the command line and keys of a recipe.
BUILD_OPTIONS = ("refittable", "version_compatible", "hardware_compatible", "weight_streaming")
