"""sana_export's verbs as commands of optimum-cli: `optimum-cli sana VERB ...` and `optimum-cli export sana --model MODEL OUT`.

The first has the words of `sana-export`; the second names model and folder as optimum does, and explains optimum's other options.
Both run `sana_export.cli.main`, so results, errors and exit codes are those of `sana-export`. Requires optimum 2.3.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from sana_export.cli.main import Parser, add_output_options, main, parse, parse_with
from sana_export.cli.verb import path_named
from sana_export.cli.verbs.export import MODEL_HELP, VERB, add_export_options
from sana_export.errors import UsageError

EXPORT = "optimum-cli export sana"
_EXAMPLES = f"""examples:
  {EXPORT} --model tiny bundle
  {EXPORT} --model tiny --layout optimum --dtype fp32 tiny-onnx"""


@dataclass(frozen=True)
class OptimumOption:
    """An option of `optimum-cli export onnx` that `sana-export export` does not have."""

    #: What to do instead.
    instead: str = ""
    #: Values that an export has anyway. With one of them, the option is left out.
    same: tuple[str, ...] = ()
    #: The words that mean the same here. None if there are none.
    words: tuple[str, ...] | None = None


_SIZES = "omit it: the graphs take every size, batch and prompt length"
_CLEAN = "omit it: the graphs are cleaned up when they are exported"
#: Every option of optimum-onnx's command, and `--fp16` of older versions.
OPTIMUM_OPTIONS: dict[str, OptimumOption] = {
    "--fp16": OptimumOption(words=("--dtype", "fp16")),
    "--cache_dir": OptimumOption(words=("--cache-dir",)),
    "--task": OptimumOption(
        "omit it for text-to-image; --graphs default,img2img adds image-to-image and inpainting", same=("auto", "text-to-image")
    ),
    "--device": OptimumOption("omit it: an export runs on the CPU, and its graphs run on any device", same=("cpu",)),
    "--framework": OptimumOption("omit it: checkpoints are PyTorch's", same=("pt",)),
    "--library-name": OptimumOption("omit it: checkpoints are diffusers'", same=("diffusers",)),
    "--opset": OptimumOption("omit it: the export chooses opset 20"),
    "--optimize": OptimumOption(_CLEAN),
    "--no-post-process": OptimumOption(_CLEAN),
    "--no-constant-folding": OptimumOption(_CLEAN),
    "--slim": OptimumOption(_CLEAN),
    "--dynamo": OptimumOption(words=()),  # always on
    "--monolith": OptimumOption("omit it: --layout optimum writes one graph for each component"),
    "--atol": OptimumOption("omit it: an export checks its graphs, and `sana-export verify` the whole bundle"),
    "--trust-remote-code": OptimumOption("omit it: an export runs no code from a checkpoint"),
    "--pad_token_id": OptimumOption("omit it: the checkpoint's tokenizer decides"),
    "--model-kwargs": OptimumOption("omit it; --lora, --vae, --transformer and --controlnet change the model"),
    "--no-dynamic-axes": OptimumOption(_SIZES),
    **dict.fromkeys(("--batch_size", "--sequence_length", "--height", "--width", "--num_channels"), OptimumOption(_SIZES)),
}


class _PassedOn(BaseOptimumCLICommand):
    """A command whose words are not optimum's to read."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.prefix_chars = ""  # `--help` and every other option is a word for us
        parser.add_argument("words", nargs=argparse.REMAINDER)

    @staticmethod
    def read(words: Sequence[str]) -> argparse.Namespace:
        """The options of a verb that `words` mean."""
        raise NotImplementedError

    def run(self) -> None:
        raise SystemExit(main(self.args.words, self.read))


class Sana(_PassedOn):
    """`optimum-cli sana VERB ...`."""

    COMMAND = CommandInfo(name="sana", help="Export, build, verify and run Sana with sana-export.")

    @staticmethod
    def read(words: Sequence[str]) -> argparse.Namespace:
        return parse(words, prog="optimum-cli sana")


class ExportSana(_PassedOn):
    """`optimum-cli export sana --model MODEL OUT`."""

    COMMAND = CommandInfo(name="sana", help="Export a Sana text-to-image model with sana-export.")

    @staticmethod
    def read(words: Sequence[str]) -> argparse.Namespace:
        return parse_with(make_parser(), translated(words))


def make_parser() -> Parser:
    """The parser of `optimum-cli export sana`. Its options are those of the verb `export`."""
    parser = Parser(
        prog=EXPORT,
        description=VERB.description,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-m", "--model", required=True, help=MODEL_HELP)
    parser.add_argument("output", metavar="OUT", type=path_named("OUT"), help="folder of the bundle, or of optimum's layout")
    add_export_options(parser)
    add_output_options(parser)
    parser.set_defaults(verb=VERB.name)
    return parser


def translated(words: Sequence[str]) -> list[str]:
    """`words` with optimum's options exchanged for ours. OUT may also be written as `-o OUT`, as in `sana-export export`.

    Raises UsageError for an option, or a value of it, that has no counterpart.
    """
    output, others, rest = list[str](), list[str](), iter(words)
    for word in rest:
        name, assigned, value = word.partition("=")
        option = OPTIMUM_OPTIONS.get(name)
        if name in ("-o", "--output"):
            output += [value] if assigned else [*itertools.islice(rest, 1)]
        elif option is None:
            others.append(word)
        elif option.words is not None:
            others += (*option.words, value) if assigned else option.words
        else:
            value = value if assigned or not option.same else next(rest, "")
            if value not in option.same:
                raise UsageError(
                    f"{EXPORT} does not support {name} {value}".rstrip() if option.same else f"{EXPORT} has no option {name}",
                    found=" ".join(words),
                    wanted=" or ".join(option.same) or None,
                    fix=option.instead,
                )
    return [*output, *others]
