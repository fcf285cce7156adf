"""The work of a workload: ours counted from the bundle's ONNX files, diffusers' from the checkpoint's configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sana_export.bench.work.call_shape import call_shape, stage_work
from sana_export.bench.work.count import BUNDLE, REFERENCE, Work
from sana_export.bench.work.onnx import onnx_work
from sana_export.bench.workload import Workload
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.manifest import PRECISIONS, Manifest


def workload_work(bundle: Path, manifest: Manifest, checkpoint: SanaCheckpoint, work: Workload) -> dict[str, dict[str, Work]]:
    """`BUNDLE` and `REFERENCE` to the work of each stage, summed over one call for each prompt of `work`."""
    from sana_export.bench.work.networks import reference_work  # imports torch

    def graph_work(name: str, sizes: Mapping[str, int]) -> Work:
        return onnx_work(bundle / manifest.graphs[name].files[0].path, sizes)

    dtype = PRECISIONS["fp32" if work.device == "cpu" else "bf16"]
    configs = {name: checkpoint.config(name) for name in ("transformer", "vae", "text_encoder")}
    totals: dict[str, dict[str, Work]] = {BUNDLE: {}, REFERENCE: {}}
    for prompt in work.prompts:
        shape = call_shape(bundle, manifest, work, prompt)
        found = {
            BUNDLE: stage_work(shape, graph_work),
            REFERENCE: reference_work(configs, shape, dict.fromkeys(configs, dtype)),
        }
        for whose, stages in found.items():
            for stage, amount in stages.items():
                totals[whose][stage] = totals[whose].get(stage, Work()) + amount
    return totals
