"""What a verb is and what it answers, and the options that several verbs share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.cli.terminal.console import QUIET, Console


@dataclass(frozen=True)
class Answer:
    """What a verb found: `document` is the one that --json prints, `text` is for people. Both go to stdout."""

    document: Mapping[str, Any]
    text: str
    exit_code: int = 0


@dataclass(frozen=True)
class Verb:
    """One row of the table of verbs. `level` is the least level of log records that stderr shows without -v or -q."""

    name: str
    summary: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], Answer]
    level: int = QUIET


class ListAction(argparse.Action):
    """Collects names separated by blanks or commas, over all uses of the option, into one list."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        names = split_names([values] if isinstance(values, str) else values)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *names])


def split_names(values: Iterable[str]) -> list[str]:
    """["a,b", "c d"] to ["a", "b", "c", "d"]."""
    return [name for value in values for name in re.split(r"[\s,]+", value) if name]


def add_names(parser: argparse.ArgumentParser, option: str, metavar: str, help: str) -> None:
    """An option that takes names separated by blanks or commas; its value is a list, empty where it is not given."""
    parser.add_argument(option, nargs="+", action=ListAction, default=[], metavar=metavar, help=help)


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by `sana-export export`")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which files of a checkpoint are meant, what lies over them and how to get them."""
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument("--variant", metavar="NAME", help="weight files to take, for example fp16: *.fp16.safetensors")
    parser.add_argument(
        "--transformer",
        metavar="FILE",
        type=Path,
        help="a .safetensors file with the transformer's weights, in place of the checkpoint's (diffusers' or the original names)",
    )
    parser.add_argument(
        "--lora",
        metavar="PATH[:SCALE]",
        action="append",
        default=[],
        help="a LoRA in the format of diffusers or PEFT, folded into the transformer's weights; may be given several times",
    )
    add_hub_options(parser)


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how a hub id is fetched."""
    parser.add_argument("--token", metavar="TOKEN", help="the hub's access token (default: HF_TOKEN, or what `hf auth login` left)")
    parser.add_argument(
        "--cache-dir", metavar="DIR", type=Path, help="where files of the hub are kept (default: huggingface_hub's)"
    )
    parser.add_argument("--offline", action="store_true", help="take a hub id from the cache and do not ask the hub")


def model_options(files: Any, hub: Any) -> dict[str, Any]:
    """What `open_checkpoint` takes beside MODEL.

    `files` has the attributes revision, variant, transformer and lora (a recipe or parsed options), `hub` has token, cache_dir and
    offline (parsed options). Raises UsageError for a LoRA's scale that is no number.
    """
    from sana_export.adapters import parse_lora
    from sana_export.checkpoint.hub import Hub

    return {
        "revision": files.revision,
        "weights_variant": files.variant,
        "transformer": files.transformer,
        "loras": tuple(map(parse_lora, files.lora)),
        "hub": Hub(hub.token or None, hub.cache_dir, hub.offline),
    }


def add_size(parser: argparse.ArgumentParser, meaning: str) -> None:
    for option in ("--height", "--width"):
        parser.add_argument(option, type=positive, metavar="PIXELS", help=f"{option[2:]} of {meaning}")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
