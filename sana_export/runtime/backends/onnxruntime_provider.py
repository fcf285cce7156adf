"""Which execution provider ONNX Runtime runs on, and what makes CUDA's work.

`onnxruntime-gpu` lists its CUDA provider on every machine and brings no CUDA libraries. A session whose provider cannot start runs
on the CPU, and only ONNX Runtime's log says so.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.cuda_errors import find_failure
from sana_export.errors import DependencyError, first_line
from sana_export.machine import find_cuda_error, find_gpus, require_gpu
from sana_export.records import GraphEntry

log = logging.getLogger(__name__)

CPU, CUDA, RTX = "CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"
#: The device that each provider keeps its tensors on.
DEVICES = {RTX: "cuda", CUDA: "cuda", CPU: "cpu"}
#: By default the CUDA provider rounds the factors of float32 products to TF32; our float32 is exact. And its memory arena grows by
#: powers of two, so up to half of what it takes stays unused.
_OPTIONS: dict[str, dict[str, str]] = {CPU: {}, CUDA: {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}}
#: What ONNX Runtime, CUDA, cuBLAS and cuDNN report when memory runs out, in lower case.
_OUT_OF_MEMORY = (
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "_alloc_failed",
    "the resource allocation failed",
)
INSTALL = 'pip uninstall -y onnxruntime && pip install --force-reinstall "onnxruntime-gpu[cuda,cudnn]"'


class Provider(ABC):
    """An execution provider, on one device."""

    #: ONNX Runtime's name of it.
    name: str
    #: The index of its GPU; 0 on the CPU.
    number: int
    #: The precisions of the bundles that it can run.
    precisions: tuple[str, ...]

    @abstractmethod
    def session(self, onnxruntime: Any, graph: GraphEntry, path: Path, options: Any, extra: Mapping[str, str]) -> Any:
        """An InferenceSession of the ONNX file `path` of `graph` that runs on this provider and nothing else.

        `options` are the SessionOptions, `extra` options of the provider that replace the defaults. Raises DependencyError if the
        provider cannot start or memory runs out, and whatever ONNX Runtime raises if it cannot run the graph.
        """


class BuiltInProvider(Provider):
    """CUDA's provider or the CPU's, which are parts of onnxruntime-gpu and onnxruntime."""

    # The CPU's has no bfloat16 kernels. CUDA's has none for Pad, Clip, and DepthToSpace, and ONNX allows bfloat16 in Conv from
    # opset 22 on.
    precisions = ("fp32", "fp16")

    def __init__(self, name: str, number: int = 0) -> None:
        self.name, self.number = name, number

    def session(self, onnxruntime: Any, graph: GraphEntry, path: Path, options: Any, extra: Mapping[str, str]) -> Any:
        device = {"device_id": str(self.number)} if self.name == CUDA else {}
        providers: list[Any] = [(self.name, {**_OPTIONS[self.name], **device, **extra})]
        if self.name != CPU:
            providers.append(CPU)
        with cuda_failures(f"loading {graph.spec.name}", DEVICES[self.name]):
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        check_provider(onnxruntime, session, self.name, f"loading {graph.spec.name}")
        return session


def choose_provider(onnxruntime: Any, device: int | None = None) -> str:
    """CUDA's provider if this ONNX Runtime has it and there is a GPU (`device`, or the first one), otherwise the CPU's.

    `onnxruntime` is the module. CUDA's libraries are loaded, from the packages that `onnxruntime-gpu[cuda,cudnn]` installs. Raises
    UsageError if there are GPUs but not this one.
    """
    if CUDA not in onnxruntime.get_available_providers():
        return CPU
    if find_gpus() and device is not None:
        require_gpu(device)
    if not find_gpus():
        error = find_cuda_error()
        # Hiding the GPU is how a user asks for the CPU. Any other error is news.
        level = logging.INFO if error in (None, "CUDA_ERROR_NO_DEVICE") else logging.WARNING
        log.log(level, "onnxruntime-gpu runs on the CPU: CUDA finds no GPU (%s)", error or "no driver")
        return CPU
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find, and programs write JSON to stdout
        onnxruntime.preload_dlls()
    return CUDA


def check_provider(onnxruntime: Any, session: Any, wanted: str, doing: str) -> None:
    """Raise DependencyError if `session` does not run on the provider `wanted`, because that could not start."""
    if (active := session.get_providers()[0]) == wanted:
        return
    # CUDA may have failed earlier in this process, or its memory may be full. Any other answer means that a library is missing.
    with contextlib.suppress(RuntimeError), cuda_failures(doing, DEVICES[wanted]):
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), DEVICES[wanted], 0)
    version = getattr(onnxruntime, "cuda_version", "") or "the version that onnxruntime was built for"
    raise DependencyError(
        f"onnxruntime could not start its {wanted} while {doing}",
        found=f"a session on {active}; ONNX Runtime's own message, above, names what is missing",
        wanted=f"the libraries of CUDA {version} and cuDNN, which onnxruntime-gpu does not bring by itself",
        fix=f"{INSTALL}; to run on the CPU instead, set CUDA_VISIBLE_DEVICES=-1",
    )


@contextlib.contextmanager
def cuda_failures(doing: str, device: str) -> Iterator[None]:
    """Errors of CUDA, and of memory that ran out, become DependencyErrors. Others pass: ONNX Runtime's have no common base."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(words in text.lower() for words in _OUT_OF_MEMORY):
            raise DependencyError(
                f"out of memory while {doing} with onnxruntime on the {device}",
                found=first_line(error),
                wanted="more free memory",
                fix="generate fewer or smaller images at once, or free memory",
            ) from error
        if device == "cuda" and (failure := find_failure(text)) is not None:
            raise DependencyError(
                f"CUDA failed while {doing} with onnxruntime", found=first_line(error), wanted=failure.wanted, fix=failure.fix
            ) from error
        raise
