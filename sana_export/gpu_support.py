"""Which backends run on which NVIDIA GPUs, by compute capability. Nothing is loaded or asked to answer that.

Sources: NVIDIA's support matrices of TensorRT-RTX and TensorRT. TensorRT-RTX 1.7.1 itself shows what a portable engine contains;
it builds for 8.0, which the matrices of TensorRT-RTX up to 1.5 do not list. ONNX Runtime's TensorRT-RTX provider 0.5 names its GPUs
in the header of its options.
"""

from __future__ import annotations

from dataclasses import dataclass

from sana_export.environment import release

_ENGINES = ("tensorrt", "tensorrt-rtx")
_OTHERS = ("onnxruntime-tensorrt-rtx", "onnxruntime", "onnxruntime-cuda-graphs", "torch", "torch-compile")


@dataclass(frozen=True)
class GpuSupport:
    """One row: GPUs of one compute capability."""

    #: Their names in short.
    cards: str
    #: TensorRT-RTX runs on them.
    rtx: bool = True
    #: ONNX Runtime's TensorRT-RTX provider runs on them, if TensorRT-RTX does.
    rtx_provider: bool = True
    #: A portable TensorRT-RTX engine contains them. Otherwise the compute capability has to be named when an engine is built.
    portable: bool = True
    #: No graphics card has this compute capability.
    datacenter: bool = False


#: Every compute capability that NVIDIA lists for TensorRT or TensorRT-RTX in graphics cards and servers, the newest first.
GPU_SUPPORT = {
    "12.1": GpuSupport("DGX Spark"),
    "12.0": GpuSupport("RTX 50, RTX PRO Blackwell"),
    "10.3": GpuSupport("B300", rtx=False, portable=False, datacenter=True),
    "10.0": GpuSupport("B200", rtx=False, portable=False, datacenter=True),
    "9.0": GpuSupport("H100, H200", rtx=False, portable=False, datacenter=True),
    "8.9": GpuSupport("RTX 40, RTX Ada, L4, L40S"),
    "8.6": GpuSupport("RTX 30, RTX A series, A10, A40"),
    "8.0": GpuSupport("A100", rtx_provider=False, datacenter=True),
    "7.5": GpuSupport("RTX 20, T4", rtx_provider=False, portable=False),
}
#: The compute capabilities that TensorRT-RTX runs on.
RTX_CAPABILITIES = tuple(sorted((name for name, row in GPU_SUPPORT.items() if row.rtx), key=release))
#: Those that ONNX Runtime's TensorRT-RTX provider runs on.
RTX_PROVIDER = tuple(name for name in RTX_CAPABILITIES if GPU_SUPPORT[name].rtx_provider)
#: Those that a portable TensorRT-RTX engine contains.
RTX_PORTABLE = tuple(name for name in RTX_CAPABILITIES if GPU_SUPPORT[name].portable)
#: The oldest compute capability that TensorRT runs on.
OLDEST = min(GPU_SUPPORT, key=release)


def unsupported_reason(backend: str, capability: str) -> str | None:
    """Why `backend` does not run on a GPU of this compute capability ("8.9"); None if it does.

    TensorRT is expected to support GPUs that are newer than the table, TensorRT-RTX is not. Whether an old GPU is supported by ONNX
    Runtime or PyTorch depends on how they were built, so they are never refused.
    """
    if backend == "tensorrt-rtx" and capability not in RTX_CAPABILITIES:
        return f"TensorRT-RTX does not support compute capability {capability}, only {', '.join(RTX_CAPABILITIES)}"
    if backend == "onnxruntime-tensorrt-rtx" and capability not in RTX_PROVIDER:
        return (
            f"ONNX Runtime's TensorRT-RTX provider does not support compute capability {capability}, only {', '.join(RTX_PROVIDER)}"
        )
    if backend == "tensorrt" and release(capability) < release(OLDEST):
        return f"TensorRT does not support compute capability {capability}, only {OLDEST} and later"
    return None


def is_datacenter(capability: str) -> bool:
    """Whether only GPUs of datacenters have this compute capability."""
    return GPU_SUPPORT[capability].datacenter if capability in GPU_SUPPORT else False


def backends_for(capability: str) -> tuple[str, ...]:
    """The backends that run on a GPU of this compute capability, in the order in which `auto` tries them."""
    return tuple(name for name in (*_ENGINES, *_OTHERS) if unsupported_reason(name, capability) is None)
