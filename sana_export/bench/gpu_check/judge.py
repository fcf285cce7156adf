"""A second judge of each engine: Polygraphy runs it, and ONNX Runtime on the CPU, on the inputs of a run, and compares the outputs.

The parity parts compare a backend of ours with diffusers. If one of them fails, this part tells whether the engine is wrong or our
runtime runs it wrong: none of the runtime's code takes part in Polygraphy's run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.bench.gpu_check.bundles import build, checkpoint_of, exported
from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.bench.gpu_check.parity import CASES, ENGINES
from sana_export.contract import GraphSpec
from sana_export.formats.arrays import Array
from sana_export.manifest import Manifest

PROMPT = "a red apple on a table"


def check(context: PartContext, *, backend: str, cases: Any = CASES, size: int = 256) -> Mapping[str, Any]:
    """Judge every engine of each case: graph to the ratios in dB to ONNX Runtime's outputs, of Polygraphy's run and of ours.

    With `backend` "onnxruntime", Polygraphy runs ONNX Runtime without its optimizations in place of engines, on any machine. Raises
    CheckFailed if a ratio misses the limit of the bundle's precision, and DependencyError if Polygraphy is missing or cannot run.
    """
    from sana_export.verify.bundle import Sampling
    from sana_export.verify.layers import snr_limit
    from sana_export.verify.polygraphy_package import comparator
    from sana_export.verify.recorded_inputs import record_inputs

    comparator(rtx=backend == "tensorrt-rtx")  # before the long work
    rows: dict[str, Any] = {}
    missed: list[str] = []
    for model, dtype, precision, layers in cases:
        name, checkpoint = f"{model}-{precision}", checkpoint_of(context, model, dtype)
        bundle = exported(context, checkpoint, f"parity-{name}", precision, layers)
        if backend in ENGINES:
            build(bundle, backend)
        inputs = record_inputs(bundle, _judged(bundle, backend), Sampling((PROMPT,), size, size, 2))
        rows[name] = _ratios(bundle, backend, inputs, context)
        limit = snr_limit(precision)
        for graph, row in rows[name].items():
            missed += [
                f"{name} {graph}: {who} {ratio:.1f} dB" for who, ratio in row.items() if ratio is not None and not ratio >= limit
            ]
        context.keep({"cases": rows})
    if missed:
        raise CheckFailed("; ".join(missed))
    return {"cases": rows}


def _judged(bundle: Path, backend: str) -> dict[str, Path]:
    """Graph to the file that Polygraphy runs: the engine, or the ONNX file."""
    manifest = Manifest.load(bundle)
    if backend not in ENGINES:
        return {graph: bundle / entry.onnx.path for graph, entry in manifest.graphs.items()}
    return {engine.graph: bundle / engine.file.path for engine in manifest.engines if engine.backend == backend}


def _ratios(bundle: Path, backend: str, inputs: Mapping[str, Mapping[str, Array]], context: PartContext) -> dict[str, Any]:
    """Graph to the lowest ratio in dB of its outputs, from Polygraphy's runner and from our runtime."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    from sana_export.runtime import SanaRuntime
    from sana_export.verify.layer_engines import infer

    manifest, judged, rows = Manifest.load(bundle), _judged(bundle, backend), {}
    with SanaRuntime.from_pretrained(bundle, backend=backend) as runtime:
        for graph, feeds in inputs.items():
            spec = manifest.graphs[graph].spec
            wanted = infer(OnnxrtRunner(SessionFromOnnx(str(bundle / manifest.graphs[graph].onnx.path))), feeds)
            found = infer(polygraphy_runner(judged[graph], backend), feeds)
            ours = runtime.run(graph, feeds)
            read = {name: runtime.to_host(ours[name]) for name in _readable(spec)}
            rows[graph] = {"polygraphy_db": lowest_ratio(wanted, found), "runtime_db": lowest_ratio(wanted, read)}
    return rows


def polygraphy_runner(path: Path, backend: str) -> Any:
    """Polygraphy's runner of an engine, or of an ONNX file without ONNX Runtime's optimizations."""
    if backend not in ENGINES:
        from onnxruntime import GraphOptimizationLevel
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

        plain = GraphOptimizationLevel.ORT_DISABLE_ALL
        return OnnxrtRunner(SessionFromOnnx(str(path), graph_optimization_level=plain))
    from polygraphy.backend.common import BytesFromPath

    from sana_export.verify.layer_engines import polygraphy_trt

    trt = polygraphy_trt(rtx=backend == "tensorrt-rtx")
    # Our engines may not allocate while they run, so their memory comes from outside.
    return trt.TrtRunner(trt.EngineFromBytes(BytesFromPath(str(path))), allocation_strategy="runtime")


def _readable(spec: GraphSpec) -> list[str]:
    """The outputs that the runtime copies to the host."""
    return [tensor.name for tensor in spec.outputs if tensor.dtype not in ("float16", "bfloat16")]


def lowest_ratio(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> float | None:
    """The lowest of Polygraphy's signal-to-noise ratios in dB, -999 to 999. None without tensors."""
    from sana_export.verify.polygraphy_package import comparator, quiet

    if not found:
        return None
    module = comparator()
    with quiet():
        pair = [module.IterationResult({name: np.asarray(side[name], np.float32) for name in found}) for side in (wanted, found)]
        results = module.SnrCompareFunc()(*pair).values()
    ratios = [-999.0 if isinstance(result, bool) else result.snr for result in results]
    return float(np.clip(np.nan_to_num(ratios, nan=-999.0), -999.0, 999.0).min())
