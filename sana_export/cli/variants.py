"""`sana-export variants`: the table of checkpoints that are known by name."""

from __future__ import annotations

import argparse
import dataclasses

from sana_export.cli.console import Console
from sana_export.cli.text import table
from sana_export.cli.verb import Answer, Verb
from sana_export.variants import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beyond the common ones."""


def run(options: argparse.Namespace, console: Console) -> Answer:
    rows = [
        (
            variant.alias,
            f"{variant.native_size} px",
            "yes" if variant.clamp else "no",
            f"{variant.flow_shift:g}",
            variant.steps,
            f"{variant.guidance_scale:g}",
            variant.source,
        )
        for variant in VARIANTS.values()
    ]
    header = ("alias", "native size", "clamp", "flow shift", "steps", "guidance", "source")
    licenses = dict.fromkeys(variant.license for variant in VARIANTS.values())
    notes = [
        "Any other hub id or local folder in the format of diffusers works too, as long as it is a Sana.",
        *(f"{_names(text)}: {text}." for text in licenses),
    ]
    document = {"variants": [{**dataclasses.asdict(variant), "source": variant.source} for variant in VARIANTS.values()]}
    return Answer(document, table(rows, header) + "\n\n" + "\n".join(notes))


def _names(license: str) -> str:
    synthetic = [variant.alias for variant in VARIANTS.values() if variant.recipe and variant.license == license]
    return ", ".join(synthetic) or "published checkpoints"


VERB = Verb(
    name="variants",
    summary="the checkpoints that are known by name",
    description="Lists the checkpoints that are known by name and what follows from each.",
    example="sana-export variants --json",
    add_arguments=add_arguments,
    run=run,
)
