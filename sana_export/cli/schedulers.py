"""The options of `generate` that choose how it samples: --scheduler, --timesteps, --sigmas."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sana_export.numeric import shown


def add_scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        type=scheduler,
        help="dpm++2m, dpm++3m, dpm++2m-sde, dpm++2s, unipc, euler, heun, lcm, a class of diffusers, or its config as JSON "
        "(default: the checkpoint's)",
    )
    parser.add_argument("--timesteps", metavar="T,T,...", type=numbers, help="instead of --steps, if the scheduler takes timesteps")
    parser.add_argument("--sigmas", metavar="S,S,...", type=numbers, help="instead of --steps, if the scheduler takes sigmas")


def scheduler_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The parameters of `SanaRuntime.__call__` that these options are."""
    return {"scheduler": options.scheduler, "timesteps": options.timesteps, "sigmas": options.sigmas}


def scheduler(text: str) -> Any:
    """A name, or a config in JSON, for argparse."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not JSON: {error}") from error


def numbers(text: str) -> list[float]:
    """Numbers with commas between them, for argparse."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of numbers such as 0.9,0.6,0.3") from error
