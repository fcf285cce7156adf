"""What this machine can do, measured in the run that it is compared with: its fastest matrix product and its fastest copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from sana_export.bench.work.count import Rates

#: Sides of the square products that are tried, and bytes of the copied buffer, by device. The buffer is larger than caches.
_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
_COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}
#: A ceiling is the best of many short runs: so long each of them is repeated, and at least so often.
_SECONDS, _LEAST_RUNS = 0.2, 3
#: Precision of a bundle to the dtype of torch's product.
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def measure_rates(device: str, precision: str, threads: int) -> Rates:
    """The best rates on "cpu" or "cuda": of square products in `precision` (on the CPU in float32), and of a copy."""
    import torch

    if device == "cpu":
        torch.set_num_threads(threads)
        return Rates(*_best_product(_cpu_products(threads)), "fp32", "measured on the cpu: best of torch, numpy, onnxruntime")
    dtype = getattr(torch, _DTYPES[precision])
    return Rates(*_best_product(_cuda_products(dtype)), precision, "measured on the gpu: torch")


def better(one: Rates | None, other: Rates | None) -> Rates | None:
    """The higher of each rate of two measurements, either of which may have failed."""
    if one is None or other is None:
        return one or other
    return Rates(max(one.flop, other.flop), max(one.bytes, other.bytes), one.precision, one.source)


#: Something to time: FLOP or bytes, and what does them and returns seconds.
Trial = tuple[int, Callable[[], float]]


def _best_product(trials: tuple[Iterable[Trial], Iterable[Trial]]) -> tuple[float, float]:
    products, copies = trials
    return max(amount / _least(run) for amount, run in products), max(amount / _least(run) for amount, run in copies)


def _least(run: Callable[[], float]) -> float:
    """The shortest of repeated runs, after one that does not count."""
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


def _cpu_products(threads: int) -> tuple[list[Trial], list[Trial]]:
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


def _cuda_products(dtype: Any) -> tuple[list[Trial], list[Trial]]:
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
