"""Latency of one backend on one model: whole calls with one prompt, for each batch. The images are compared with eager's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sana_export.bench.candidates.runtime import WrongDevice
from sana_export.bench.candidates.table import BASELINE, Job, find_row, resolve
from sana_export.bench.gpu_check.bundles import PRECISION, build, bundle_name, checkpoint_of, exported, without_onnx
from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.bench.gpu_check.parity import ENGINES
from sana_export.bench.gpu_watch import GpuWatch
from sana_export.bench.stages import summarize
from sana_export.bench.workload import Workload
from sana_export.export.parity import IMAGE_PSNR_LIMITS, psnr
from sana_export.quantization.schemes import SCHEMES

PROMPT, SEED = "A cute panda eating bamboo, ink drawing style", 0
#: Number of warm-up calls, and batch to the number of counted calls.
WARM_UP, COUNTED = 2, {1: 8, 4: 4}
STAGES = ("denoise_loop", "vae_decoder", "end_to_end")


def measure(
    context: PartContext,
    *,
    model: str,
    backend: str,
    exported: bool,
    scheme: str | None = None,
    batches: Iterable[int] = (1, 4),
    size: int = 1024,
    steps: int = 20,
) -> Mapping[str, Any]:
    """Time one backend, with `scheme` on a quantized bundle.

    Returns rows: batch to the times of `STAGES`, the first call, the peak device memory and the PSNR. If a batch fails, those of
    the earlier ones are kept. Raises CheckFailed if the images differ from eager's.
    """
    workload = Workload(
        "gpu-check", size, size, steps, 4.5, (PROMPT,), warmup=WARM_UP, repeats=max(COUNTED.values()), device=context.device
    )
    job, candidate = _job(context, model, backend, exported, scheme, workload), None
    found: dict[str, Any] = {"rows": {}}
    wrong: list[str] = []
    for batch in batches:
        if backend in ENGINES:  # tuned for exactly this shape
            build(Path(job.bundle), backend, "--height", str(size), "--width", str(size), "--batch", str(batch))
        if candidate is None or backend in ENGINES:
            candidate, seconds = _load(job, candidate)
            found |= {"load_seconds": seconds, "description": candidate.description}
        candidate.job = replace(job, workload=replace(workload, images_per_prompt=batch))
        row, images = _row(candidate, COUNTED.get(batch, 4))
        row["psnr_db"] = _compare(context, f"{model}-{size}-{steps}-{batch}", backend, images)
        found["rows"][str(batch)] = row
        context.keep(found)
        unquantized = min(IMAGE_PSNR_LIMITS[PRECISION], IMAGE_PSNR_LIMITS["bf16"])
        limit = unquantized if scheme is None else SCHEMES[scheme].psnr_limit
        if row["psnr_db"] is not None and row["psnr_db"] < limit:
            wrong.append(f"batch {batch}: {row['psnr_db']:.1f} dB against eager (limit {limit:g})")
    if wrong:
        raise CheckFailed("the images differ from eager's: " + "; ".join(wrong))
    return found


def _job(context: PartContext, model: str, backend: str, with_onnx: bool, scheme: str | None, workload: Workload) -> Job:
    checkpoint = checkpoint_of(context, model)
    if with_onnx or scheme is not None:
        bundle = exported(context, checkpoint, bundle_name(model, scheme), quantize=scheme)
    else:
        bundle = without_onnx(context, checkpoint, model)
    clamp = checkpoint.trained_with_clamp().on
    threads = workload.resolved_threads()
    return Job(backend, str(bundle), str(checkpoint.folder), None, PRECISION, clamp, (), threads, workload)


def _load(job: Job, old: Any) -> tuple[Any, float]:
    """Close `old`, then load the candidate. Returns it and the seconds that loading took."""
    if old is not None:
        old.runtime.close()
    started = perf_counter()
    try:
        return resolve(find_row(job.backend).load)(job), round(perf_counter() - started, 2)
    except WrongDevice as error:  # not a missing package, which would only skip the part
        raise CheckFailed(str(error)) from error


def _row(candidate: Any, counted: int) -> tuple[dict[str, Any], Any]:
    """The times of the counted calls and of the first call, and the last call's images, uint8 [B, H, W, 3]."""
    calls, watch = [], GpuWatch()
    cuda = torch_cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    for index in range(WARM_UP + counted):
        with watch.turn("counted", os.getpid()) if index >= WARM_UP else nullcontext():
            started = perf_counter()
            sample = candidate.generate(PROMPT, SEED)
            calls.append({**sample.times, "end_to_end": [1e3 * (perf_counter() - started)]})
    gpu = watch.summary("counted")
    peak = candidate.peak_device_bytes() if cuda is None else cuda.max_memory_reserved()
    row: dict[str, Any] = {"first_ms": calls[0]["end_to_end"][0], "peak_device_bytes": peak or (gpu or {}).get("process_bytes")}
    row["gpu"] = gpu
    for stage in STAGES:
        summary = summarize(time for call in calls[WARM_UP:] for time in call.get(stage, ()))
        row[stage] = None if summary is None else asdict(summary)
    return row, np.stack([np.asarray(image) for image in sample.images])


def torch_cuda() -> Any:
    """torch.cuda if this process computes with it, else None."""
    torch: Any = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _compare(context: PartContext, name: str, backend: str, images: Any) -> float | None:
    """PSNR in dB (at most 999) against eager's images of that name. None for eager, which saves them, and if there are none."""
    path = context.work / "images" / f"{name}.npy"
    if backend == BASELINE:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, images)
        return None
    if not path.is_file():
        return None
    return min(psnr(images, np.load(path), peak=255.0), 999.0)
