"""What a verb is and what it returns, and the options that several verbs share."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sana_export.cli.terminal.console import QUIET, Console
from sana_export.commands import model_words
from sana_export.errors import ArtifactError
from sana_export.hub.client import Hub
from sana_export.hub.names import is_address
from sana_export.manifest import Manifest
from sana_export.numeric import MOST_DEVICES, MOST_THREADS, shown
from sana_export.runtime.memory import AUTO
from sana_export.user_paths import user_path

#: No option takes a number with more digits.
_MOST_DIGITS = 20


@dataclass(frozen=True)
class Answer:
    """The result of a verb, for stdout."""

    #: What --json prints.
    document: Mapping[str, Any]
    #: What a person reads.
    text: str
    #: Exit code of the process.
    exit_code: int = 0


@dataclass(frozen=True)
class Verb:
    """One row of the table of verbs."""

    #: The word on the command line.
    name: str
    #: One line in `sana-export --help`.
    summary: str
    #: First paragraph of the verb's own help.
    description: str
    #: Complete commands, one a line.
    example: str
    #: Adds the verb's arguments to its parser.
    add_arguments: Callable[[argparse.ArgumentParser], None]
    #: Does the work.
    run: Callable[[argparse.Namespace, Console], Answer]
    #: The lowest level of log records that stderr shows without -v and -q.
    level: int = QUIET


class ListAction(argparse.Action):
    """Collects names separated by spaces or commas, over all uses of the option, into one list."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        names = split_names([values] if isinstance(values, str) else values)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *names])


def split_names(values: Iterable[str]) -> list[str]:
    """["a,b", "c d"] to ["a", "b", "c", "d"]."""
    return [name for value in values for name in re.split(r"[\s,]+", value) if name]


def add_names(parser: argparse.ArgumentParser, option: str, metavar: str, help: str) -> None:
    """An option that takes names separated by spaces or commas. Its value is a list, empty by default."""
    parser.add_argument(option, nargs="+", action=ListAction, default=[], metavar=metavar, help=help)


def add_bundle(parser: argparse.ArgumentParser, nargs: Literal["?"] | None = None) -> None:
    """The positional argument BUNDLE, a folder."""
    kind = path_named("BUNDLE")
    parser.add_argument("bundle", metavar="BUNDLE", nargs=nargs, type=kind, help="a folder made by `sana-export export`")


def add_bundle_to_read(parser: argparse.ArgumentParser, nargs: Literal["?"] | None = None) -> None:
    """The positional argument BUNDLE, a folder or a repository, for `bundle_to_read`. The parser needs `add_hub_options` too."""
    meaning = "a folder made by `sana-export export`, or a repository of the hub (owner/name, owner/name@revision)"
    parser.add_argument("bundle", metavar="BUNDLE", nargs=nargs, type=_bundle_name, help=meaning)


def _bundle_name(text: str) -> str:
    """`text`, if it can be the name of a folder or a repository. Raises UsageError if not."""
    if not is_address(text):
        user_path(text, "BUNDLE")
    return text


def bundle_to_read(options: argparse.Namespace, *, backend: str | None = None) -> Path:
    """The folder of BUNDLE (`find_bundle`). `backend`: what runs it; None or "auto": anything may.

    Raises UsageError for an unknown backend, before anything is downloaded.
    """
    from sana_export.hub.bundles.source import find_bundle
    from sana_export.runtime.backends import check_backend

    check_backend(backend or AUTO)
    named = None if backend == AUTO else backend
    return find_bundle(options.bundle, hub=hub_options(options), backend=named, device=getattr(options, "device", None))


def hub_options(options: Any) -> Hub:
    """How to use the hub, from the options of `add_hub_options`."""
    return Hub(options.token or None, options.cache_dir, options.offline)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose a checkpoint's files, overlay other weights and fetch from the hub."""
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id (default: the main branch)")
    parser.add_argument("--variant", metavar="NAME", help="which weight files to use, for example fp16: *.fp16.safetensors")
    parser.add_argument(
        "--transformer",
        metavar="FILE",
        type=path_named("--transformer"),
        help="a .safetensors file with weights that replace the checkpoint's transformer (diffusers' names or the original ones)",
    )
    parser.add_argument(
        "--vae",
        metavar="VAE",
        help="an autoencoder in place of the checkpoint's: alias (dc-ae-lite), hub id, or local folder in diffusers' format",
    )
    parser.add_argument(
        "--controlnet",
        metavar="CONTROLNET",
        help="a ControlNet to export with the checkpoint: alias (controlnet-hed-1600m), hub id, local folder in diffusers' format, "
        "or file (.safetensors, .pth)",
    )
    parser.add_argument(
        "--lora",
        metavar="PATH[:SCALE]",
        action="append",
        default=[],
        help="a LoRA, merged into the transformer's weights; SCALE: 0.7, or with other scales for some layers: 0.7,attn2=0.5; can "
        "be given several times",
    )
    add_hub_options(parser)


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """The options for fetching a hub id."""
    parser.add_argument(
        "--token", metavar="TOKEN", help="access token for the hub (default: HF_TOKEN, or the login saved by `hf auth login`)"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=path_named("--cache-dir"),
        help="folder for files from the hub (default: huggingface_hub's)",
    )
    parser.add_argument("--offline", action="store_true", help="use only cached files; never contact the hub")


def model_options(files: Any, hub: Any) -> dict[str, Any]:
    """Keyword arguments of `open_checkpoint` from options.

    `files` has the attributes revision, variant, transformer, vae, controlnet and lora (parsed options or a recipe). `hub` has
    token, cache_dir and offline (parsed options). Raises UsageError if a LoRA's scale is not a number.
    """
    from sana_export.adapters import parse_lora

    return {
        "revision": files.revision,
        "weights_variant": files.variant,
        "transformer": files.transformer,
        "vae": files.vae,
        "controlnet": files.controlnet,
        "loras": tuple(map(parse_lora, files.lora)),
        "hub": hub_options(hub),
    }


def reference_options(bundle: Path) -> str:
    """`--reference` with the checkpoint that `bundle` was exported from, for the command in an error."""
    try:
        return "--reference " + shlex.join(model_words(Manifest.load(bundle).checkpoint))
    except ArtifactError:  # not a bundle; the corrected command will say so
        return "--reference MODEL"


def add_size(parser: argparse.ArgumentParser, meaning: str) -> None:
    """--height and --width of `meaning`."""
    for option in ("--height", "--width"):
        parser.add_argument(option, type=positive, metavar="PIXELS", help=f"{option[2:]} of {meaning}")


#: The options of `add_intervals` and the parameters that they set.
_INTERVALS = {"--guidance-interval": "guidance_interval", "--pag-interval": "pag_interval"}


def add_intervals(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--guidance-interval and --pag-interval. `purpose` comes before what they are."""
    for (option, name), kind in zip(_INTERVALS.items(), ("guidance", "PAG"), strict=True):
        example = "; 0.2 0.8: steps 4 to 15 of 20" if name == "guidance_interval" else ""
        parser.add_argument(
            option,
            dest=name,
            nargs=2,
            type=float,
            metavar=("START", "STOP"),
            help=f"{purpose}{kind} in this part of the steps{example} (default: 0 1, all)",
        )


def given_intervals(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """The intervals that the user gave, by parameter."""
    given = {name: getattr(options, name) for name in _INTERVALS.values()}
    return {name: tuple(values) for name, values in given.items() if values is not None}


def add_device(parser: argparse.ArgumentParser, threads: str = "the backend decides") -> None:
    """--device and --threads of `SanaRuntime.from_pretrained`. `threads` says what the default number is."""
    parser.add_argument("--device", type=whole(0, MOST_DEVICES), metavar="N", help="index of the GPU (default: the first one)")
    parser.add_argument(
        "--threads", type=whole(1, MOST_THREADS), metavar="N", help=f"threads for work on the CPU (default: {threads})"
    )


def path_named(name: str) -> Callable[[str], Path]:
    """A type for argparse: the path that a user writes as the argument `name` (`user_path`)."""
    return partial(user_path, what=name)


def positive(text: str) -> int:
    """A whole number, 1 or more, for argparse."""
    return whole(1)(text)


def index(text: str) -> int:
    """A whole number, 0 or more, for argparse."""
    return whole(0)(text)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from `least` to `most`."""
    wanted = f", {least} or more" if most is None else f" from {least} to {most}"

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > _MOST_DIGITS or not least <= int(text) <= (int(text) if most is None else most):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number{wanted}")
        return int(text)

    return parse
