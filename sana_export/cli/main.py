"""`sana-export`: reads the command line, runs one verb, and turns whatever comes of it into output and an exit code.

Exit codes: 0 done, 1 a bug of ours, 2 usage, 3 environment or dependency, 4 artifact stale, damaged or unfit for this machine,
5 parity or quality limit missed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from sana_export import __version__
from sana_export.cli.terminal.console import EVERYTHING, SILENT, VERBOSE, Console, logging_to
from sana_export.cli.terminal.failure import describe
from sana_export.cli.terminal.interrupt import EXIT_CODE as INTERRUPTED
from sana_export.cli.terminal.interrupt import interruptible
from sana_export.cli.terminal.stdout import Stdout
from sana_export.cli.verb import Answer, Verb
from sana_export.cli.verbs import bench, build, doctor, engines, export, generate, inspect, synth, variants, verify
from sana_export.errors import UsageError

VERBS: dict[str, Verb] = {
    module.VERB.name: module.VERB for module in (engines, export, build, verify, generate, bench, inspect, doctor, variants, synth)
}
#: Verbosity by the count of -v minus the count of -q.
LEVELS = {-1: SILENT, 1: VERBOSE, 2: EVERYTHING}
#: Libraries that set their own level of logging when they are imported read it from here.
QUIET_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print to stderr and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (that of the process where it is None) and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or bool(os.environ.get("SANA_EXPORT_DEBUG"))
    stdout = Stdout(as_json="--json" in arguments)
    try:
        with interruptible(lambda: _interrupted(stdout)):
            answer = _run(parse(arguments), stdout)
            stdout.write(answer.document, answer.text)
            return answer.exit_code
    except KeyboardInterrupt:
        _interrupted(stdout)
        return INTERRUPTED
    except SystemExit as end:  # argparse after --help and --version
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        failure = describe(error)
        if debug:
            traceback.print_exc(file=sys.stderr)
        _say(f"error: {failure.text}")
        stdout.write_json({"error": failure.document, "exit_code": failure.exit_code})
        return failure.exit_code


def _run(options: argparse.Namespace, stdout: Stdout) -> Answer:
    verb = VERBS[options.verb]
    verbosity = max(-1, min(options.verbose - options.quiet, 2))
    if verbosity <= 0:
        for name, value in QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console(level=LEVELS.get(verbosity, verb.level))
    with stdout.guarded(), logging_to(console, everything=verbosity > 0):
        return verb.run(options, console)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Raises UsageError, for an unknown option with the one that is nearest to it."""
    parser, verbs = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if not unknown:
        return options
    known = [option for action in verbs[options.verb]._actions for option in action.option_strings]
    near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
    raise UsageError(
        f"unrecognized argument {unknown[0]!r}",
        wanted=f"{near[0]}?" if near else None,
        fix=f"sana-export {options.verb} --help",
    )


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and those of the verbs."""
    parser = Parser(
        prog="sana-export",
        description="Takes a Sana checkpoint to ONNX graphs and TensorRT engines, and samples with them without PyTorch.",
        epilog="example:\n  sana-export export tiny -o bundle\n  sana-export generate bundle 'a red apple' -o apple.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sana-export {__version__}")
    choices = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs = {}
    for verb in VERBS.values():
        verbs[verb.name] = choices.add_parser(
            verb.name,
            help=verb.summary,
            description=verb.description,
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.add_arguments(verbs[verb.name])
        _add_common(verbs[verb.name])
    return parser, verbs


def _add_common(parser: argparse.ArgumentParser) -> None:
    group: Any = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    group.add_argument("-q", "--quiet", action="count", default=0, help="only errors on stderr")
    group.add_argument("-v", "--verbose", action="count", default=0, help="more on stderr; twice for everything")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr
        sys.stderr.write(f"sana-export: {text}\n")


def _interrupted(stdout: Stdout) -> None:
    _say("interrupted")
    stdout.write_json({"error": {"type": "KeyboardInterrupt", "message": "interrupted"}, "exit_code": INTERRUPTED})


if __name__ == "__main__":
    raise SystemExit(main())
