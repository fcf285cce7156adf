"""`sana-export variants`: lists the checkpoints that are known by name."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.text import table
from sana_export.cli.verb import Answer, Verb
from sana_export.variants import VARIANTS, Variant

_HEADER = ("alias", "size", "parameters", "layers", "trained in", "qk norm", "guidance", "positions", "shift", "steps", "source")
_NOTES = (
    "parameters: of the transformer. trained in: fp16 means with clipped self-attention outputs; an export clips them too.",
    "guidance: the default scale; embedded if it is an input of the network (SANA-Sprint). positions: scale of the position table.",
    "Any other hub id or local folder in diffusers' format works too if it holds a Sana model.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        action="store_true",
        help="print how much GPU memory an image takes, for every model, size, quantization scheme and memory mode, computed",
    )


def run(options: argparse.Namespace, console: Console) -> Answer:
    if options.memory:
        return _memory()
    licenses = dict.fromkeys(variant.license for variant in VARIANTS.values())
    notes = [*_NOTES, *(f"{_names(text)}: {text}." for text in licenses)]
    document = {"variants": [_document(variant) for variant in VARIANTS.values()]}
    return Answer(document, table(map(_row, VARIANTS.values()), _HEADER) + "\n\n" + "\n".join(notes))


def _memory() -> Answer:
    """The memory plan of every model, size, scheme and mode."""
    require("", "export")
    from sana_export.bench.work.activations import ACTIVATIONS
    from sana_export.bench.work.memory import CUDA_BYTES, MODES, memory_plans

    plans = list(memory_plans())
    rows = []
    for plan in plans:
        stages = [f"{stage.weights / 1e9:.2f} + {(stage.activations + stage.tensors) / 1e9:.2f}" for stage in plan.stages.values()]
        needs = [f"{plan.bytes(mode) / 1e9:.1f} GB: {_card(plan.card(mode))}" for mode in MODES]
        rows.append((plan.model, _size(plan.side, plan.tile), plan.scheme, *stages, *needs))
    header = ("model", "size", "quantization", *plans[0].stages, *MODES)
    notes = [
        "Computed, not measured. A stage: its weights + what it works in, GB. A mode: the most at a time, and the smallest card.",
        "GB are 10^9 bytes. Cards are in GiB: one of 6 GiB has 6.4 GB.",
        f"Included: {CUDA_BYTES / 1e9:.1f} GB for CUDA, an assumption. Not included: what other programs and the display use.",
        "Activations are those of fp16 engines for one image with guidance, as the builder of TensorRT-RTX states them.",
        "Those of a decoder in one piece are of its own scheme.",
    ]
    document = {
        "memory": [plan.as_json() for plan in plans],
        "activations": [dataclasses.asdict(row) for row in ACTIVATIONS],
    }
    return Answer(document, table(rows, header) + "\n\n" + "\n".join(notes))


def _size(side: int, tile: int) -> str:
    return f"{side} px" + (f", tiles of {tile}" if tile else "")


def _card(gibibytes: int | None) -> str:
    return "none" if gibibytes is None else f"{gibibytes} GiB"


def _row(variant: Variant) -> tuple[object, ...]:
    architecture = variant.architecture
    return (
        variant.alias,
        f"{variant.native_size} px",
        f"{architecture.parameters / 1e6:,.1f} M",
        architecture.layers,
        variant.weights_variant or "-",
        "yes" if architecture.qk_norm else "no",
        f"{variant.guidance_scale:g}" + (" embedded" if architecture.guidance_embeds else ""),
        _number(variant.interpolation_scale),
        _number(variant.flow_shift),
        variant.steps,
        variant.source,
    )


def _document(variant: Variant) -> dict[str, Any]:
    """Everything that a row states, and what is derived from it."""
    return {
        "alias": variant.alias,
        "source": variant.source,
        "repo": variant.repo,
        "recipe": variant.recipe,
        "native_size": variant.native_size,
        "clamp": variant.clamp,
        "weights_variant": variant.weights_variant,
        "architecture": dataclasses.asdict(variant.architecture),
        "flow_shift": variant.flow_shift,
        "interpolation_scale": variant.interpolation_scale,
        "steps": variant.steps,
        "guidance_scale": variant.guidance_scale,
        "license": variant.license,
        "transformer": variant.transformer,
        "scheduler": variant.scheduler,
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _names(license: str) -> str:
    own = [variant.alias for variant in VARIANTS.values() if not variant.repo and variant.license == license]
    return ", ".join(own) or "published checkpoints"


VERB = Verb(
    name="variants",
    summary="list the checkpoints that are known by name",
    description=(
        "Lists the checkpoints that are known by name, with their architecture and defaults. With --memory: how much GPU memory "
        "their images take."
    ),
    example="sana-export variants --json",
    add_arguments=add_arguments,
    run=run,
)
