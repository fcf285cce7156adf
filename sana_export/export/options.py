"""What to export, and how: the options of a bundle, checked against the checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.contract import ENCODERS, GRAPH_GROUPS, GRAPHS
from sana_export.errors import UsageError
from sana_export.export.quantize.statistics import CalibrationFile, CalibrationSource
from sana_export.manifest import PRECISIONS, Options
from sana_export.quantization.choice import calibrated_parts, check_method, choose_quantization
from sana_export.quantization.layers import CALIBRATED_PARTS
from sana_export.user_paths import user_path

log = logging.getLogger(__name__)


def choose_options(checkpoint: SanaCheckpoint, precision: str, pag_layers: Iterable[str | int], clamp: bool | None) -> Options:
    """Check the options against the checkpoint, choose the clamp and log the reason."""
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", found=precision, wanted=", ".join(PRECISIONS))
    trained = checkpoint.trained_with_clamp()
    if clamp is None:
        clamp = trained.on
        level = logging.INFO if trained.certain else logging.WARNING
        log.log(level, "self-attention outputs are %s: %s", "clipped to +-65504" if clamp else "not clipped", trained.reason)
        if not trained.certain:
            log.warning("if the checkpoint was trained in bf16, export it with --no-clamp")
    elif clamp != trained.on and trained.certain:
        log.warning("--%sclamp contradicts how this checkpoint was trained: %s", "" if clamp else "no-", trained.reason)
    transformer, names = checkpoint.config("transformer"), [*map(str, pag_layers)]
    if names and transformer["guidance_embeds"]:
        raise UsageError(
            f"{checkpoint.source} does not support PAG: its guidance is distilled into a single branch (SANA-Sprint)",
            found=f"--pag-layers {' '.join(names)}",
            wanted="no PAG layers",
            fix="omit --pag-layers",
        )
    layers = transformer["num_layers"]
    return Options(precision, clamp, tuple(sorted({parse_pag_layer(name, layers) for name in names})))


def parse_pag_layer(name: str, layers: int) -> int:
    """The number of the block that "transformer_blocks.8", "blocks.8" or "8" names. Raises UsageError if there is no such block."""
    number = name.removeprefix("transformer_").removeprefix("blocks.").removesuffix(".attn1")
    if not number.isdecimal() or int(number) >= layers:
        raise UsageError("unknown PAG layer", found=name, wanted=f"transformer_blocks.0 to transformer_blocks.{layers - 1}")
    return int(number)


def choose_graphs(names: Iterable[str], checkpoint: SanaCheckpoint) -> list[str]:
    """The graphs to export, in the order of contract.GRAPHS. `names` are graphs and groups.

    None means the group "default", and with a ControlNet all groups. Raises UsageError for an unknown name, and for a ControlNet's
    graphs without one.
    """
    controlled = checkpoint.controlnet is not None
    given = set(names) or (set(GRAPH_GROUPS) if controlled else {"default"})
    wanted = set[str]().union(*(GRAPH_GROUPS.get(name, (name,)) for name in given))
    if unknown := wanted - set(GRAPHS):
        groups = "; ".join(f"{name}: {', '.join(graphs)}" for name, graphs in GRAPH_GROUPS.items())
        raise UsageError("unknown graph", found=", ".join(sorted(unknown)), wanted=f"graphs, or groups of them: {groups}")
    if not controlled and (without := wanted & set(GRAPH_GROUPS["control"])):
        raise UsageError(
            "there is no ControlNet to export",
            found=f"the graph {min(without)}",
            wanted="a ControlNet, or other graphs",
            fix="--controlnet controlnet-hed-1600m",
        )
    return [name for name in GRAPHS if name in wanted]


def uses_encoder(names: Iterable[str]) -> bool:
    """Whether one of the graphs `names` encodes images."""
    return not set().union(*ENCODERS.values()).isdisjoint(names)


def choose_quantized(
    options: Options,
    names: Sequence[str],
    checkpoint: SanaCheckpoint,
    quantize: Iterable[str],
    method: Iterable[str],
    calibration: CalibrationSource | Path | None,
) -> tuple[Options, CalibrationSource | None]:
    """`options` with what is quantized and how, and the calibration if it takes one. Raises UsageError if there is none for it."""
    chosen = choose_quantization(quantize, names)
    words = check_method(chosen, method)
    options = dataclasses.replace(options, quantize=chosen, quantize_method=words)
    parts, given = calibrated_parts(chosen, words), isinstance(calibration, str | Path)
    if given and not parts:  # steps that can do without look at it too
        parts = tuple(part for part in CALIBRATED_PARTS if part in chosen)
    if not parts and given:
        wanted = f"a scheme for {' or '.join(CALIBRATED_PARTS)}, or no calibration"
        raise UsageError("nothing that is quantized takes a calibration", found=str(calibration), wanted=wanted)
    if not parts:
        return options, None
    if calibration is None:
        raise UsageError(
            f"{', '.join(parts)} cannot be quantized like this without a calibration",
            found=", ".join(f"{part}={chosen[part]}" for part in parts),
            wanted="how to measure one, or a file of `sana-export calibrate`",
            fix="calibration=sana_export.Calibration()",
        )
    source = CalibrationFile(user_path(calibration, "the calibration file")) if isinstance(calibration, str | Path) else calibration
    file = str(calibration) if given else ""
    return dataclasses.replace(options, calibration=source.key(checkpoint, options, parts), calibration_file=file), source
