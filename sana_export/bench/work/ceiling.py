"""The ceiling of this machine: its fastest matrix product and its fastest copy, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from sana_export.bench.work.count import Rates

#: Device to the sides of the square products that are tried.
_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
#: Device to the bytes of the copied buffer, which is larger than the caches.
_COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}
#: The ceiling is the best of many short runs. Each is repeated for this many seconds, and at least this many times.
_SECONDS, _LEAST_RUNS = 0.2, 3
#: Precision of a bundle to the dtype of PyTorch's products.
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def measure_rates(device: str, precision: str, threads: int, index: int | None = None) -> Rates:
    """Measure the best rates of square products in `precision` (on a CPU always float32) and of a copy.

    `device` is "cpu" or "cuda"; `index` is the GPU's, None for the first one.
    """
    import torch

    if device == "cpu":
        from sana_export.runtime.backends.torch import cpu_threads

        with cpu_threads(threads):
            return Rates(*_best(_cpu_trials(threads)), "fp32", "measured on the cpu: best of torch, numpy, onnxruntime")
    with torch.cuda.device(index or 0):
        return Rates(*_best(_cuda_trials(getattr(torch, _DTYPES[precision]))), precision, "measured on the gpu: torch")


def better(one: Rates | None, other: Rates | None) -> Rates | None:
    """The higher of each rate of two measurements. Either may be None."""
    if one is None or other is None:
        return one or other
    return Rates(max(one.flop, other.flop), max(one.bytes, other.bytes), one.precision, one.source)


#: Something to time: its FLOP or bytes, and a function that does it once and returns the seconds.
Trial = tuple[int, Callable[[], float]]


def _best(trials: tuple[Iterable[Trial], Iterable[Trial]]) -> tuple[float, float]:
    """The best rate of the products and the best rate of the copies."""
    products, copies = trials
    return max(amount / _least(run) for amount, run in products), max(amount / _least(run) for amount, run in copies)


def _least(run: Callable[[], float]) -> float:
    """The shortest time of repeated runs, after a warm-up."""
    run()
    started = time.perf_counter()
    times: list[float] = []
    while len(times) < _LEAST_RUNS or time.perf_counter() - started < _SECONDS:
        times.append(run())
    return min(times)


def _host(call: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return run


def _cpu_trials(threads: int) -> tuple[list[Trial], list[Trial]]:
    """Products and copies on the CPU."""
    import torch

    products: list[Trial] = []
    for side in _SIDES["cpu"]:
        left, right, out = (torch.randn(side, side) for _ in range(3))
        calls: list[Callable[[], Any]] = [
            partial(torch.mm, left, right, out=out),
            partial(np.matmul, left.numpy(), right.numpy(), out=out.numpy()),
            _onnxruntime_product(left.numpy(), right.numpy(), threads),
        ]
        products += [(2 * side**3, _host(call)) for call in calls]
    source = torch.ones(_COPIED["cpu"], dtype=torch.uint8)
    target = torch.empty_like(source)
    return products, [(2 * source.nbytes, _host(lambda: target.copy_(source)))]


def _onnxruntime_product(left: Any, right: Any, threads: int) -> Callable[[], Any]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, left.shape) for name in ("left", "product")]
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(right, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def _cuda_trials(dtype: Any) -> tuple[list[Trial], list[Trial]]:
    """Products and copies on the current GPU."""
    import torch

    def on_device(call: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            after.synchronize()
            return before.elapsed_time(after) / 1e3

        return run

    products: list[Trial] = []
    for side in _SIDES["cuda"]:
        left, right, out = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(3))
        products.append((2 * side**3, on_device(partial(torch.mm, left, right, out=out))))
    source = torch.ones(_COPIED["cuda"], dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return products, [(2 * source.nbytes, on_device(lambda: target.copy_(source)))]
