"""Which settings of an engine backend are faster on this GPU: those whose defaults follow its documentation and were not measured.

Each setting is tried on two blocks of 1600M, one layer of the text encoder and a small decoder, without the kernels that another
setting has cached. What one setting wins for the decoder says little about the published decoder, which is larger.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from sana_export.bench.gpu_check.bundles import build, checkpoint_of, exported
from sana_export.bench.gpu_check.check import PartContext
from sana_export.bench.gpu_check.parity import ENGINES
from sana_export.runtime import SanaRuntime

PADDED, KERNELS = "text_multiple", "dynamic_shapes_kernel_specialization_strategy"
#: Name in the report to `backend_options`.
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "text not padded": {PADDED: 1},
    "own CUDA graphs outside the loop": {"cuda_graph_strategy": "whole_graph_capture"},
    "kernels compiled before they run": {KERNELS: "eager"},
    "kernels compiled while others run": {KERNELS: "lazy"},
    "kernels for all shapes only": {KERNELS: "none"},
}
STAGES = ("text_encoder", "context", "vae_decoder")
#: Calls with one prompt, of which the first is reported alone, and prompts of different lengths after them.
CALLS, LENGTHS = 9, 12
WORD = "bamboo "


def measure(
    context: PartContext,
    *,
    backend: str,
    settings: Mapping[str, Mapping[str, Any]] = SETTINGS,
    model: str = "slice",
    size: int = 512,
) -> Mapping[str, Any]:
    """Returns rows: setting to times in ms, and cache_bytes, the size of the cached kernels.

    first_ms is loading and the first call. Each of `STAGES` has its median. new_length and longest_new_length are the text
    encoder's median and longest time with prompts of lengths that it has not seen.
    """
    bundle = exported(context, checkpoint_of(context, model), f"settings-{model}")
    if backend in ENGINES:
        build(bundle, backend, "--height", str(size), "--width", str(size))
    rows: dict[str, Any] = {}
    for name, options in settings.items():
        for cache in _caches(bundle):
            cache.unlink()
        rows[name] = _row(bundle, backend, options, size)
        context.keep({"rows": rows})
    return {"rows": rows}


def _row(bundle: Path, backend: str, options: Mapping[str, Any], size: int) -> dict[str, Any]:
    request: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": 4, "use_resolution_binning": False, "seed": 0}
    started = perf_counter()
    with SanaRuntime.from_pretrained(bundle, backend=backend, backend_options=options, prompt_cache_bytes=0) as runtime:
        first = runtime("a panda eating " + WORD, **request)
        first_ms = 1e3 * (perf_counter() - started)
        same = [runtime("a panda eating " + WORD, **request).timings for _ in range(CALLS)]
        new = [runtime("a panda eating " + WORD * count, **request).timings for count in range(2, 2 + 5 * LENGTHS, 5)]
    assert first.images
    return {
        "first_ms": first_ms,
        **{stage: _median(getattr(timings, stage) for timings in same) for stage in STAGES},
        "new_length": _median(timings.text_encoder for timings in new),
        "longest_new_length": 1e3 * max(timings.text_encoder for timings in new),
        "cache_bytes": sum(path.stat().st_size for path in _caches(bundle)),
    }


def _median(seconds: Iterable[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _caches(bundle: Path) -> list[Path]:
    return list(bundle.glob("engines/**/*.cache"))
