"""The table of parts, the most valuable first, because the time limit may end the run early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sana_export.bench.gpu_check.settings import SETTINGS

_PACKAGE = "sana_export.bench.gpu_check"
#: Modules that every part except the first needs.
_BASE = ("torch", "diffusers", "transformers", "onnx", "tokenizers")
#: Backends that run ONNX files or engines, best first, to the modules that each needs.
EXPORTED: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "cuda.core"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda.core"),
    "onnxruntime-cuda-graphs": ("onnxruntime",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-tensorrt-rtx": ("onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime"),
}
MODELS = ("1600m", "600m")
#: The files with the tests of the device, and of each backend.
DEVICE_TESTS, BACKEND_TESTS, QUANTIZED_TESTS = "test_gpu_cuda.py", "test_gpu_backends.py", "test_gpu_quantized.py"
#: The backend that quantized bundles are timed with.
QUANTIZED_BACKEND = "torch-compile"
#: The quantization schemes that are timed. PyTorch has no kernels for `nvfp4` and computes it in fp16.
TIMED_SCHEMES = ("int8-weight", "fp8", "int8", "int4-weight")


@dataclass(frozen=True)
class CheckPart:
    """One part of the run. It is skipped if something that it needs is missing."""

    #: Its name in the report.
    name: str
    #: "module:function" of a `check.Check`.
    target: str
    #: Time limit in seconds.
    most: float
    #: It does not start with fewer seconds left.
    least: float
    #: Arguments of the target.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    #: Python modules that it needs.
    modules: tuple[str, ...] = _BASE
    #: Python modules of which it needs at least one.
    one_of: tuple[str, ...] = ()
    #: Whether it needs a GPU.
    gpu: bool = True
    #: Those of its modules that must be able to use the GPU.
    on_gpu: tuple[str, ...] = ()
    #: The backend that it runs. It is skipped on a GPU that the backend does not support.
    backend: str | None = None


def _on_gpu(backend: str) -> tuple[str, ...]:
    """The module that computes for `backend`: PyTorch, unless it runs ONNX files or engines."""
    return EXPORTED.get(backend, ("torch",))[:1]


def _parity(backend: str, *modules: str) -> CheckPart:
    return CheckPart(
        f"parity/{backend}",
        f"{_PACKAGE}.parity:check",
        most=240,
        least=30,
        arguments={"backend": backend},
        modules=(*_BASE, *modules),
        on_gpu=_on_gpu(backend),
        backend=backend,
    )


def _judge(backend: str) -> CheckPart:
    modules = (*_BASE, "onnxscript", "polygraphy", "onnxruntime", *EXPORTED[backend])
    target = f"{_PACKAGE}.judge:check"
    return CheckPart(f"judge/{backend}", target, 240, 30, {"backend": backend}, modules, on_gpu=_on_gpu(backend), backend=backend)


def _tests(backend: str, *modules: str, kind: str = "tests", file: str = BACKEND_TESTS) -> CheckPart:
    needed = (*_BASE, "onnxscript", "pytest", *modules)
    arguments = {"file": file, "backend": backend}
    target = f"{_PACKAGE}.suite:run"
    return CheckPart(f"{kind}/{backend}", target, 300, 45, arguments, needed, on_gpu=_on_gpu(backend), backend=backend)


def _make(model: str) -> CheckPart:
    return CheckPart(f"make/{model}", f"{_PACKAGE}.bundles:make", most=90, least=15, arguments={"model": model})


def _export(model: str) -> CheckPart:
    modules = ("tensorrt", "tensorrt_rtx", "onnxruntime")
    return CheckPart(f"export/{model}", f"{_PACKAGE}.bundles:export", 420, 60, {"model": model}, (*_BASE, "onnxscript"), modules)


def _export_quantized(model: str, scheme: str) -> CheckPart:
    arguments = {"model": model, "scheme": scheme}
    return CheckPart(
        f"export/{model}/{scheme}", f"{_PACKAGE}.bundles:export", 420, 60, arguments, (*_BASE, "onnxscript", "onnxruntime")
    )


def _quantized_latency(model: str, scheme: str) -> CheckPart:
    part = _latency(model, QUANTIZED_BACKEND, "onnxscript", "onnxruntime", most=150, least=40)
    return replace(part, name=f"{part.name}/{scheme}", arguments={**part.arguments, "scheme": scheme})


def _latency(model: str, backend: str, *modules: str, most: float = 80, least: float = 25) -> CheckPart:
    return CheckPart(
        f"latency/{model}/{backend}",
        f"{_PACKAGE}.latency:measure",
        most,
        least,
        {"model": model, "backend": backend, "exported": backend in EXPORTED},
        (*_BASE, *modules),
        on_gpu=_on_gpu(backend),
        backend=backend,
    )


def _question(name: str) -> CheckPart:
    modules = (*_BASE, "tensorrt_rtx", "onnxscript")
    return CheckPart(f"rtx/{name}", f"{_PACKAGE}.rtx:ask", 60, 15, {"question": name}, modules, on_gpu=("torch",))


def _settings(backend: str, *names: str) -> CheckPart:
    """Measure the settings of an engine backend, by default all."""
    arguments = {"backend": backend, **({"settings": {name: SETTINGS[name] for name in names}} if names else {})}
    modules = (*_BASE, "onnxscript", *EXPORTED[backend])
    target = f"{_PACKAGE}.settings:measure"
    return CheckPart(f"settings/{backend}", target, 150, 40, arguments, modules, on_gpu=_on_gpu(backend), backend=backend)


PARTS: tuple[CheckPart, ...] = (
    CheckPart("find", f"{_PACKAGE}.find:find", most=75, least=5, modules=(), gpu=False),
    _parity("torch"),
    *map(_question, ("current", "portable", "sm80-ampere-plus")),
    _make("1600m"),
    _latency("1600m", "eager"),
    _latency("1600m", "torch"),
    _latency("1600m", "torch-compile", most=120),
    CheckPart("tests/device", f"{_PACKAGE}.suite:run", 60, 10, {"file": DEVICE_TESTS}, ("torch", "cuda.core", "pytest")),
    _tests("torch"),
    _tests("torch-compile"),
    *(_tests(backend, kind="quantized", file=QUANTIZED_TESTS) for backend in ("torch", "torch-compile")),
    *(_tests(backend, *modules) for backend, modules in EXPORTED.items()),
    _parity("torch-compile"),
    *(_parity(backend, *modules) for backend, modules in EXPORTED.items()),
    *map(_judge, ("tensorrt", "tensorrt-rtx")),
    _settings("tensorrt-rtx"),
    _settings("tensorrt", "defaults", "text not padded"),
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
    # Exports with quantization take minutes.
    *(part for scheme in TIMED_SCHEMES for part in (_export_quantized("1600m", scheme), _quantized_latency("1600m", scheme))),
)
