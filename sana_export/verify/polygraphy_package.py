"""NVIDIA's Polygraphy, imported when it is needed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sana_export.contract import GraphSpec
from sana_export.environment import default_environment
from sana_export.errors import DependencyError, UsageError, first_line
from sana_export.formats.arrays import Array
from sana_export.installation import install_command
from sana_export.trt.flavour import load, network_flags

#: The environment variable that Polygraphy reads when it is imported: "1" for TensorRT-RTX in place of TensorRT.
RTX_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"
#: Backend to the options for its engines that the other one's have not. An engine for the GPU that is there needs no list of GPUs.
_OWN_OPTIONS = {"tensorrt": [], "tensorrt-rtx": ["--use-gpu"]}


def comparator(*, rtx: bool | None = None) -> ModuleType:
    """The module polygraphy.comparator. `rtx` says which TensorRT Polygraphy has to use; None: either.

    Polygraphy takes one of the two for the whole process when it is imported. Raises UsageError for the other one afterwards, and
    DependencyError if Polygraphy is missing or too old.
    """
    loaded = "polygraphy" in sys.modules
    try:
        with default_environment({RTX_VARIABLE: "1"}) if rtx and not loaded else contextlib.nullcontext():
            from polygraphy import comparator as module
            from polygraphy import config
            from polygraphy.comparator import SnrCompareFunc  # noqa: F401 (older versions do not have it)
    except ImportError as error:
        raise DependencyError(
            "comparing tensors needs Polygraphy", found=error, wanted="polygraphy>=0.53.4", fix=install_command("export")
        ) from error
    if rtx is not None and rtx != config.USE_TENSORRT_RTX:
        raise UsageError(
            "Polygraphy uses either TensorRT-RTX or TensorRT in a process",
            found=f"{RTX_VARIABLE}={int(config.USE_TENSORRT_RTX)}",
            wanted=f"{RTX_VARIABLE}={int(rtx)}",
            fix="use the other one in a process of its own",
        )
    return module


def needs_strong_typing(backend: str) -> bool:
    """Whether `backend` has to be asked for a strongly typed network, as all our engines are. If it is not installed here: yes.

    TensorRT-RTX 1.7 and TensorRT 10 have a flag for it. TensorRT 11 has none, and Polygraphy refuses to ask for it there.
    """
    try:
        return network_flags(load(backend)) != 0
    except DependencyError:
        return True


def build_options(backend: str) -> list[str]:
    """The options of `polygraphy run` that build an engine of `backend`."""
    return ["--trt", *(["--strongly-typed"] if needs_strong_typing(backend) else []), *_OWN_OPTIONS[backend]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Polygraphy logs nothing in the block: what it finds is in its results."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), np.errstate(all="ignore"):
        yield


@contextlib.contextmanager
def polygraphy_failures(doing: str) -> Iterator[None]:
    """Polygraphy's errors become DependencyErrors: a package, a driver or a GPU is missing, or TensorRT refused."""
    from polygraphy.exception import PolygraphyException

    try:
        yield
    except (PolygraphyException, OSError) as error:
        raise DependencyError(
            f"Polygraphy could not {doing}",
            found=first_line(error),
            wanted="a GPU, and TensorRT or TensorRT-RTX with the libraries of CUDA",
            fix="sana-export doctor",
        ) from error


def save_inputs(path: Path, spec: GraphSpec, inputs: Mapping[str, Array]) -> None:
    """Save the inputs of a graph for `polygraphy run --load-inputs`."""
    comparator()
    from polygraphy.json import save_json

    with quiet():
        save_json([{tensor.name: as_polygraphy(inputs[tensor.name], tensor.dtype) for tensor in spec.inputs}], str(path))


def save_outputs(path: Path, runner: str, outputs: Mapping[str, Array]) -> None:
    """Save outputs by name as RunResults of a runner of this name, for `polygraphy run --load-outputs`."""
    results = comparator().RunResults()
    results.add([dict(outputs)], runner_name=runner)
    with quiet():
        results.save(str(path))


def as_polygraphy(values: Array, dtype: str) -> Any:
    """`values` in the kind of array that Polygraphy reads and writes `dtype` in: numpy's, and PyTorch's for bfloat16."""
    if dtype != "bfloat16":
        return values
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
