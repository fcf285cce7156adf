"""Parity of one backend with diffusers: all graphs and images of `tiny` in fp32 and fp16, and of a slice of 1600M in fp16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.bundles import build, checkpoint_of, exported, without_onnx
from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.errors import DependencyError

#: Model, dtype of its checkpoint, precision of its bundle, PAG layers.
CASES: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
    ("tiny-random", "float32", "fp32", (1,)),
    ("tiny-random", "float32", "fp16", (1,)),
    ("slice", "float16", "fp16", (1,)),
)
PROMPTS = ("a red apple on a table", "一只可爱的熊猫在吃竹子")
TORCH = ("torch", "torch-compile")
ENGINES = ("tensorrt", "tensorrt-rtx")


def check(context: PartContext, *, backend: str, cases: Any = CASES, size: int = 256) -> Mapping[str, Any]:
    """Verify the bundle of each case. Returns the worst graph and image of each case.

    Raises CheckFailed if a limit is missed or the backend cannot run, because what it needs was checked before, and DependencyError
    if torch.compile has no compiler.
    """
    from sana_export.runtime.backends.torch import require_compiler
    from sana_export.verify.bundle import Sampling, verify_bundle

    if backend == "torch-compile":
        require_compiler(context.device)
    rows: dict[str, Any] = {}
    missed: list[str] = []
    for model, dtype, precision, layers in cases:
        checkpoint, name = checkpoint_of(context, model, dtype), f"{model}-{precision}"
        make = without_onnx if backend in TORCH else exported
        bundle: Path = make(context, checkpoint, f"parity-{name}", precision, layers)
        if backend in ENGINES:
            build(bundle, backend)
        try:
            report = verify_bundle(bundle, checkpoint, Sampling(PROMPTS, size, size, 4), backend=backend)
        except DependencyError as error:
            raise CheckFailed(f"{backend} cannot run {name}: {error}") from error
        if report.device != context.device:
            raise CheckFailed(f"{backend} ran on the {report.device}, not on the {context.device}")
        rows[name] = {
            "passed": report.passed,
            "least_cosine": min(row.cosine for row in report.graphs),
            "least_image_psnr_db": min(min(row.psnr_db for row in report.images), 999.0),
            "graphs": {row.name: row.as_json() for row in report.graphs},
            "images": [row.as_json() for row in report.images],
        }
        missed += [f"{name} {row.name}: cosine {row.cosine:.7f}" for row in (*report.graphs, *report.images) if not row.passed]
        context.keep({"cases": rows})
    if missed:
        raise CheckFailed("; ".join(missed))
    return {"cases": rows}
