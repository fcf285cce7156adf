"""Does TensorRT-RTX work on this GPU? Each part builds an engine in one of three ways, loads it, runs it and compares.

The graph is `tiny`'s denoiser in fp16, which has all kinds of layers of the large models. PyTorch provides the device's memory and
stream. An engine that the library refuses is an answer, with the library's messages, and not a failed check. Wrong numbers fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.bundles import checkpoint_of, exported
from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.bench.torch_engine import Refused, bind
from sana_export.trt.logger import CollectedLog, logger_for

GRAPH = "denoiser"
COSINE_LIMIT = 0.999


def _current(module: Any, config: Any) -> None:
    config.num_compute_capabilities = 1
    config.set_compute_capability(module.ComputeCapability.CURRENT, 0)


def _portable(module: Any, config: Any) -> None:
    """The builder's default."""


def _ampere_plus(module: Any, config: Any) -> None:
    config.num_compute_capabilities = 1
    config.set_compute_capability(module.ComputeCapability.SM80, 0)
    config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS


QUESTIONS: dict[str, Callable[[Any, Any], None]] = {
    "current": _current,
    "portable": _portable,
    "sm80-ampere-plus": _ampere_plus,
}


def ask(context: PartContext, *, question: str) -> Mapping[str, Any]:
    """Returns version, built, loaded, ran (bool), build_seconds, bytes, cosine, and said (the library's messages).

    Raises CheckFailed for wrong numbers.
    """
    import tensorrt_rtx as module

    from sana_export.manifest import Manifest

    bundle = exported(context, checkpoint_of(context, "tiny-random", "float32"), "rtx-tiny", graphs=(GRAPH,))
    spec = Manifest.load(bundle).graphs[GRAPH].spec
    with logger_for(module).collect() as log:
        return _ask(context, module, bundle, spec, question, log)


def _ask(context: PartContext, module: Any, bundle: Path, spec: Any, question: str, log: CollectedLog) -> Mapping[str, Any]:
    logger = logger_for(module)
    found: dict[str, Any] = {"version": module.__version__, "built": False, "loaded": False, "ran": False, "said": []}

    def record(**more: Any) -> None:
        found.update(more, said=log.errors)
        context.keep(found)

    started = time.monotonic()
    plan = _build(module, logger, bundle / f"onnx/{GRAPH}/model.onnx", spec, QUESTIONS[question])
    record(built=plan is not None, build_seconds=round(time.monotonic() - started, 2), bytes=plan.nbytes if plan is not None else 0)
    if plan is None or context.device != "cuda":
        return found
    engine = module.Runtime(logger).deserialize_cuda_engine(plan)
    record(loaded=engine is not None)
    if engine is None:
        return found
    cosine = _run(context, module, engine, spec, bundle)
    record(ran=cosine is not None, cosine=cosine)
    if cosine is not None and not cosine >= COSINE_LIMIT:
        raise CheckFailed(f"the engine runs but its output is wrong: cosine {cosine} (limit {COSINE_LIMIT})")
    return found


def _build(module: Any, logger: Any, onnx: Path, spec: Any, choose: Callable[[Any, Any], None]) -> Any:
    from sana_export.export.example_inputs import CHECK_SIZES
    from sana_export.trt.build import configure
    from sana_export.trt.flavour import network_flags
    from sana_export.trt.options import DEFAULT_OPTIONS

    builder = module.Builder(logger)
    network = builder.create_network(network_flags(module))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        return None
    axes = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str)}
    ranges = {axis: (1, CHECK_SIZES.of(axis), 16) for axis in axes}
    config = configure(module, builder, spec, ranges, DEFAULT_OPTIONS, ())
    choose(module, config)
    return builder.build_serialized_network(network, config)


def _run(context: PartContext, module: Any, engine: Any, spec: Any, bundle: Path) -> float | None:
    """Cosine of the engine's output with the PyTorch module's on the same inputs. None if the library refuses to run it."""
    import torch

    from sana_export.export.example_inputs import CHECK_SIZES, random_inputs
    from sana_export.export.parity import cosine
    from sana_export.graphs.builders import build_graph
    from sana_export.manifest import Manifest

    inputs = {name: value.cuda() for name, value in random_inputs(spec, CHECK_SIZES, 0).items()}
    try:
        bound = bind(module, engine, spec, inputs)
    except Refused:
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not bound.context.execute_async_v3(stream.cuda_stream):
        return None
    stream.synchronize()
    (tensor,) = spec.outputs
    output = bound.tensors[tensor.name]
    checkpoint, options = checkpoint_of(context, "tiny-random", "float32"), Manifest.load(bundle).options
    with torch.no_grad():
        wanted = build_graph(GRAPH, checkpoint, options).cuda()(*(inputs[tensor.name] for tensor in spec.inputs))
    return cosine(output.cpu().numpy(), wanted.float().cpu().numpy())
