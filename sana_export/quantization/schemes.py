"""The schemes: how a layer's weights are stored, and what its inputs are rounded to."""

from __future__ import annotations

from dataclasses import dataclass, field

from sana_export.gpu_support import RTX_CAPABILITIES
from sana_export.quantization.method import Method

#: The bits of one value of each type.
BITS = {"int8": 8, "fp8": 8, "int4": 4, "fp4": 4}
#: How many numbers of FP4 share a scale.
BLOCK = 16
#: Bytes of one scale of the types whose scales do not have the bundle's precision. NVFP4 stores its own in FP8.
SCALE_BYTES = {"fp4": 1}


@dataclass(frozen=True)
class Scheme:
    """One way to store a layer."""

    #: Its name on the command line.
    name: str
    #: The type of the weights.
    weights: str
    #: How many inputs of one output channel share a scale. 0: all of them.
    block: int
    #: The first version of ONNX's operator set that can express it.
    opset: int
    #: The compute capabilities of the GPUs that TensorRT-RTX compiles it for.
    capabilities: tuple[str, ...]
    #: The type of the layers' inputs. "": the bundle's precision.
    inputs: str = ""
    #: How its numbers are chosen if the user does not say.
    method: Method = field(default_factory=Method)
    #: The steps of a method that it can take.
    steps: tuple[str, ...] = ("search", "gptq")
    #: The least cosine of a graph's outputs with those of the same graph of diffusers.
    cosine_limit: float = 0.0
    #: The least PSNR in dB of an image against diffusers'.
    psnr_limit: float = 0.0
    #: The least mean PSNR in dB of the images of `verify --quality`. Plain rounding gives `tiny` 50.5 dB in 8 bits, 29.3 dB in 4.
    quality_psnr: float = 30.0
    #: The largest difference in percentage points between the top-1 of `verify --quality` and the reference's.
    quality_top1: float = 1.0

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return BITS[self.weights]

    @property
    def input_bits(self) -> int:
        """Bits of one number of the layers' inputs."""
        return BITS.get(self.inputs, 16)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8-weight", "int8", 0, 20, RTX_CAPABILITIES, cosine_limit=0.998, psnr_limit=25.0),
        Scheme(
            "int4-weight",
            "int4",
            32,
            21,
            RTX_CAPABILITIES[1:],
            method=Method(search=True, rank=32),
            steps=("search", "gptq", "rescale", "low-rank"),
            cosine_limit=0.95,
            psnr_limit=12.0,
            quality_psnr=25.0,
            quality_top1=3.0,
        ),
        Scheme(
            "int8",
            "int8",
            0,
            20,
            RTX_CAPABILITIES,
            inputs="int8",
            method=Method(rescale=True),
            steps=("search", "gptq", "rescale", "ranges"),
            cosine_limit=0.99,
            psnr_limit=15.0,
        ),
        Scheme(
            "fp8",
            "fp8",
            0,
            20,
            ("8.9", "12.0", "12.1"),
            inputs="fp8",
            steps=("rescale", "ranges"),
            cosine_limit=0.99,
            psnr_limit=15.0,
        ),
        Scheme(
            "nvfp4",
            "fp4",
            BLOCK,
            23,
            ("12.0", "12.1"),
            inputs="fp4",
            method=Method(search=True, rank=32),
            steps=("search", "gptq", "rescale", "low-rank"),
            cosine_limit=0.95,
            psnr_limit=12.0,
            quality_psnr=25.0,
            quality_top1=3.0,
        ),
    )
}
#: What a layer takes that does not tolerate, or does not fit, the blocks of a scheme with fewer bits.
FALLBACK = SCHEMES["int8-weight"]
