"""Where a quantized graph runs: the compute capabilities that engines with a scheme can have, and what ONNX Runtime lacks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sana_export.errors import UsageError
from sana_export.gpu_support import RTX_CAPABILITIES, RTX_PORTABLE
from sana_export.quantization.schemes import SCHEMES

#: The type that ONNX Runtime has no kernels for.
NO_KERNELS = "fp4"


def check_target(part: str, name: str, backend: str, capabilities: Collection[str], *, fix: str, named: str) -> None:
    """Raise UsageError unless engines of `backend` for these compute capabilities can have the scheme `name` of `part`.

    No compute capability means a portable engine. TensorRT-RTX compiles one without the GPUs that lack the type, and says nothing,
    so it is refused if one that a portable engine contains is missing. `fix` is the command that exports `part` with `FALLBACK`,
    which has every target, and `named` the one that builds for the GPUs that have the type. For TensorRT the table is an
    assumption: it was never run.
    """
    portable = not capabilities and backend == "tensorrt-rtx"
    if refused := lacking(name, backend, capabilities):
        raise UsageError(
            f"{backend} has no {SCHEMES[name].weights} for compute capability {', '.join(refused)}"
            + (", which a portable engine is for too" if portable else ""),
            found=f"{part} quantized with {name}",
            wanted=f"compute capability {', '.join(SCHEMES[name].capabilities)}, or another scheme for {part}",
            fix=named if portable else fix,
        )


def lacking(name: str, backend: str, capabilities: Collection[str]) -> list[str]:
    """Those of the compute capabilities of an engine of `backend` that the scheme `name` does not exist for."""
    wanted = RTX_PORTABLE if not capabilities and backend == "tensorrt-rtx" else capabilities
    return [capability for capability in wanted if capability in RTX_CAPABILITIES and capability not in SCHEMES[name].capabilities]


def common_capabilities(names: Iterable[str]) -> tuple[str, ...]:
    """The compute capabilities that TensorRT-RTX compiles every one of these schemes for.

    Empty if those of a portable engine are among them: then a build does not have to name any.
    """
    own = [SCHEMES[name].capabilities for name in names]
    found = tuple(capability for capability in RTX_CAPABILITIES if all(capability in possible for possible in own))
    return () if set(RTX_PORTABLE) <= set(found) else found


def without_kernels(chosen: Mapping[str, str]) -> dict[str, str]:
    """Those parts of `chosen`, with their schemes, whose weights ONNX Runtime has no kernels for."""
    return {part: name for part, name in chosen.items() if SCHEMES[name].weights == NO_KERNELS}


def portable_targets(name: str) -> tuple[str, ...]:
    """The compute capabilities in a portable TensorRT-RTX engine with the scheme. Empty: those of every portable engine."""
    found = tuple(capability for capability in RTX_PORTABLE if capability in SCHEMES[name].capabilities)
    return () if found == RTX_PORTABLE else found
