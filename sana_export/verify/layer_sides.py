"""The two ways that `verify --layers` computes a graph's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from sana_export.contract import GraphSpec
from sana_export.errors import UsageError
from sana_export.export.evaluator import TensorEvaluator
from sana_export.formats.arrays import Array
from sana_export.runtime.backends.onnxruntime_provider import CPU, CUDA, check_provider, choose_provider
from sana_export.runtime.memory import AUTO
from sana_export.verify.polygraphy_package import RTX_VARIABLE, build_options

#: The dtype that ONNX Runtime has too few kernels for.
MISSING_DTYPE = "bfloat16"
#: Backends for engines, and whether Polygraphy has to use TensorRT-RTX for them.
ENGINES = {"tensorrt": False, "tensorrt-rtx": True}


class Computes(Protocol):
    """Returns tensors of one graph as float32 arrays by name."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Side:
    """One way to compute tensors of a graph."""

    #: What it is, for the report.
    name: str
    #: Prepares the tensors of these names.
    compute: Callable[[Sequence[str]], Computes]


def float32_side(path: Path, threads: int | None) -> Side:
    """The side that the other one is compared with: float32 throughout."""
    return Side("float32", partial(TensorEvaluator, path, threads=threads, arithmetic="float32"))


@dataclass(frozen=True)
class SideChoice:
    """What is compared with float32."""

    #: A backend that runs ONNX files or engines. "auto": the CPU, or with a device ONNX Runtime.
    backend: str
    #: The bundle's dtype.
    dtype: str
    #: Index of the GPU. None: the first one.
    device: int | None = None
    #: Threads for work on the CPU.
    threads: int | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a backend that cannot return intermediate tensors."""
        if self.backend not in (AUTO, *ENGINES) and (self.backend != "onnxruntime" or self.dtype == MISSING_DTYPE):
            raise UsageError(
                f"the backend {self.backend} cannot return the intermediate tensors of a {self.dtype} graph",
                found=self.backend,
                wanted=", ".join([*ENGINES, *(["onnxruntime"] if self.dtype != MISSING_DTYPE else [])]),
                fix="leave out --backend, to compare on the CPU",
            )

    @property
    def runner(self) -> list[str]:
        """The options of `polygraphy run` that are nearest to it."""
        if self.backend in ENGINES:
            return build_options(self.backend)
        return build_options("tensorrt") if self.dtype == MISSING_DTYPE else ["--onnxrt"]

    @property
    def environment(self) -> str:
        """What comes before the command `polygraphy` in a POSIX shell."""
        return f"{RTX_VARIABLE}=1 " if ENGINES.get(self.backend) else ""

    def side(self, path: Path, spec: GraphSpec, inputs: Mapping[str, Array]) -> Side:
        """It, for the ONNX file at `path` and inputs of these shapes. Raises DependencyError if a package or a GPU is missing."""
        if self.backend in ENGINES:
            from sana_export.verify.layer_engines import MarkedEngine

            rtx = ENGINES[self.backend]
            return Side(f"{self.backend} with these tensors as outputs", partial(MarkedEngine, path, spec, inputs, rtx=rtx))
        if self.backend != AUTO or self.device is not None:
            return _onnxruntime(path, self.device, self.threads)
        if self.dtype == "float32":
            compute = partial(TensorEvaluator, path, threads=self.threads, arithmetic="native")
            return Side("ONNX Runtime's optimizations", compute)
        return Side(f"{self.dtype} storage", partial(TensorEvaluator, path, threads=self.threads, arithmetic="stored"))


def _onnxruntime(path: Path, device: int | None, threads: int | None) -> Side:
    """ONNX Runtime as the runtime uses it: on the GPU `device`, or on the CPU if there is none."""
    import onnxruntime

    provider = choose_provider(onnxruntime, device)
    options = {"device_id": device or 0, "use_tf32": 0} if provider == CUDA else {}
    providers = [(provider, options), *([CPU] if provider == CUDA else [])]

    def compute(tensors: Sequence[str]) -> TensorEvaluator:
        evaluator = TensorEvaluator(path, tensors, threads, arithmetic="native", providers=providers)
        check_provider(onnxruntime, evaluator, provider, f"loading {path}")
        return evaluator

    return Side(f"ONNX Runtime on {provider}", compute)
