"""What a run is made of: one table of parts, the most valuable first, since the time may end before the table does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PACKAGE = "sana_export.bench.gpu_check"
#: What every part but the first needs.
_BASE = ("torch", "diffusers", "transformers", "onnx", "tokenizers")
#: Backends that run ONNX files or engines, best first: the modules that each needs, and of those where the CUDA provider counts.
EXPORTED: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "cuda.core"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda.core"),
    "onnxruntime-cuda-graphs": ("onnxruntime",),
    "onnxruntime": ("onnxruntime",),
}
MODELS = ("1600m", "600m")


@dataclass(frozen=True)
class Part:
    """One part. `target` is "module:function" of a `check.Check`, called with `arguments`.

    most: seconds after which it is ended. least: it is not begun with fewer left. modules: Python modules without which it is left
    out. one_of: likewise, where any one of them will do. gpu: it is left out without one. cuda_provider: it is left out where ONNX
    Runtime has no CUDA provider.
    """

    name: str
    target: str
    most: float
    least: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = _BASE
    one_of: tuple[str, ...] = ()
    gpu: bool = True
    cuda_provider: bool = False


def _parity(backend: str, *modules: str) -> Part:
    return Part(
        f"parity/{backend}",
        f"{_PACKAGE}.parity:check",
        most=90,
        least=20,
        arguments={"backend": backend},
        modules=(*_BASE, *modules),
        cuda_provider="onnxruntime" in modules,
    )


def _make(model: str) -> Part:
    return Part(f"make/{model}", f"{_PACKAGE}.bundles:make", most=90, least=15, arguments={"model": model})


def _export(model: str) -> Part:
    modules = ("tensorrt", "tensorrt_rtx", "onnxruntime")
    return Part(f"export/{model}", f"{_PACKAGE}.bundles:export", 180, 45, {"model": model}, (*_BASE, "onnxscript"), modules)


def _latency(model: str, backend: str, *modules: str, most: float = 80, least: float = 25) -> Part:
    return Part(
        f"latency/{model}/{backend}",
        f"{_PACKAGE}.latency:measure",
        most,
        least,
        {"model": model, "backend": backend, "exported": backend in EXPORTED},
        (*_BASE, *modules),
        cuda_provider="onnxruntime" in modules,
    )


def _question(name: str) -> Part:
    return Part(f"rtx/{name}", f"{_PACKAGE}.rtx:ask", 60, 15, {"question": name}, (*_BASE, "tensorrt_rtx", "onnxscript"))


PARTS: tuple[Part, ...] = (
    Part("find", f"{_PACKAGE}.find:find", most=40, least=5, modules=(), gpu=False),
    _parity("torch"),
    *map(_question, ("current", "portable", "sm80-ampere-plus")),
    _make("1600m"),
    _latency("1600m", "eager"),
    _latency("1600m", "torch"),
    _latency("1600m", "torch-compile", most=120),
    Part("tests", f"{_PACKAGE}.suite:run", most=90, least=20, modules=(*_BASE, "pytest")),
    _parity("torch-compile"),
    *(_parity(backend, *modules) for backend, modules in EXPORTED.items()),
    _export("1600m"),
    *(_latency("1600m", backend, *modules, most=220, least=40) for backend, modules in EXPORTED.items()),
    _make("600m"),
    _latency("600m", "eager"),
    _latency("600m", "torch"),
    _latency("600m", "torch-compile", most=120),
    _latency("1600m", "compile", most=180, least=60),
    _export("600m"),
    *(_latency("600m", backend, *modules, most=120, least=40) for backend, modules in EXPORTED.items()),
    _latency("600m", "compile", most=180, least=60),
)
