"""`sana-export synth`: writes a checkpoint with seeded random weights in the exact config of a known one."""

from __future__ import annotations

import argparse
import re
import shlex

from sana_export.autoencoders import AUTOENCODERS, DECODERS, find_autoencoder
from sana_export.cli.packages import require
from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.terminal.text import size
from sana_export.cli.verb import Answer, Verb, index, path_named
from sana_export.commands import first_export_command
from sana_export.controlnets import CONTROLNETS, find_controlnet
from sana_export.errors import UsageError
from sana_export.manifest import PRECISIONS
from sana_export.variants import VARIANTS

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DEFAULT_SHARD = "2GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="VARIANT",
        help="alias or hub id from `sana-export variants`, an autoencoder for --vae ("
        + ", ".join(AUTOENCODERS)
        + "), or a ControlNet for --controlnet ("
        + ", ".join(CONTROLNETS)
        + ")",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=path_named("--output"), required=True, help="folder of the checkpoint"
    )
    parser.add_argument(
        "--vae",
        choices=tuple(DECODERS),
        help="decoder of the checkpoint's autoencoder (default: dc-ae, that of the published ones)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(PRECISIONS),
        help="dtype of the weights (default: that of the published checkpoint; fp32 for the small ones)",
    )
    parser.add_argument("--seed", type=index, default=0, metavar="N", help="seed of the weights (default: 0)")
    parser.add_argument(
        "--hot",
        action="store_true",
        help="weights with heavy tails and activations with outlier channels, as published checkpoints have: for quantization",
    )
    parser.add_argument(
        "--shard-size",
        type=_bytes,
        default=_bytes(_DEFAULT_SHARD),
        metavar="SIZE",
        help=f"largest size of a weight file, for example 500MB (default: {_DEFAULT_SHARD})",
    )


def run(options: argparse.Namespace, console: Console) -> Answer:
    require("", "export")
    from sana_export.synth.checkpoint import find_recipe, make_autoencoder, make_checkpoint, make_controlnet

    folder, row, controlnet = options.output, find_autoencoder(options.model), find_controlnet(options.model)
    settings = {"seed": options.seed, "shard_size": options.shard_size, "hot": options.hot, "on_progress": console.show}
    if options.vae is not None and (controlnet is not None or row is not None):
        what = "a ControlNet" if row is None else "an autoencoder itself"
        raise UsageError(f"{options.model} is {what}", found=f"--vae {options.vae}", fix="omit --vae")
    if controlnet is not None:
        name, dtype = controlnet.alias, options.dtype or "fp32"
        make_controlnet(name, folder, dtype=PRECISIONS[dtype], **settings)
        following = f"sana-export export MODEL --controlnet {shlex.quote(str(folder))} -o BUNDLE"
    elif row is not None:
        name, dtype = row.alias, options.dtype or "fp32"
        make_autoencoder(row.alias, folder, dtype=PRECISIONS[dtype], **settings)
        following = f"sana-export export MODEL --vae {shlex.quote(str(folder))} -o BUNDLE"
    else:
        recipe = find_recipe(options.model)
        name, dtype = recipe.name, options.dtype or VARIANTS[recipe.name].weights_variant or "fp32"
        make_checkpoint(recipe, folder, dtype=PRECISIONS[dtype], vae=options.vae, **settings)
        following = first_export_command(folder)
    console.clear()
    files = [file for file in folder.rglob("*") if file.is_file()]
    document = {
        "checkpoint": str(folder),
        "variant": name,
        "synthetic": True,
        "dtype": dtype,
        "seed": options.seed,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }
    document |= ({"vae": options.vae} if options.vae else {}) | ({"hot": True} if options.hot else {})
    full_name = name if options.vae is None else f"{name} with {options.vae}"
    weights = f"{'hot ' if options.hot else ''}random weights of seed {options.seed}"
    text = f"{folder}: {full_name}, synthetic: {weights}, {dtype}, {size(document['bytes'])}\nnext: {following}"
    return Answer(document, text)


def _bytes(text: str) -> int:
    """ "500MB" to 500000000."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.upper())
    count = int(float(parts[1]) * _UNITS.get(parts[2], 0)) if parts else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    return count


VERB = Verb(
    name="synth",
    summary="write a synthetic checkpoint: random weights in a known config",
    description=(
        "Writes a checkpoint with seeded random weights in the exact config of a known one, in diffusers' folder format and with "
        "bounded memory. For benchmarks and tests only: its images are meaningless."
    ),
    example="sana-export synth sana-600m-1024px -o checkpoints/600m --dtype fp16 --seed 0",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
