"""`sana-export`: parses the command line, runs one verb, and turns its result or its error into output and an exit code.

Exit codes: 0 success, 1 a bug in sana-export, 2 usage, 3 environment or dependency, 4 artifact stale, damaged or not usable on
this machine, 5 parity or quality limit missed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from sana_export import __version__
from sana_export.cli.terminal.console import EVERYTHING, SILENT, VERBOSE, Console, logging_to
from sana_export.cli.terminal.failure import describe
from sana_export.cli.terminal.interrupt import EXIT_CODE as INTERRUPTED
from sana_export.cli.terminal.interrupt import interruptible
from sana_export.cli.terminal.stdout import Stdout, open_streams
from sana_export.cli.verb import Answer, Verb
from sana_export.cli.verbs import (
    bench,
    build,
    calibrate,
    doctor,
    engines,
    export,
    generate,
    inspect,
    pull,
    push,
    serve,
    synth,
    variants,
    verify,
)
from sana_export.environment import NO_TELEMETRY, default_environment
from sana_export.errors import UsageError
from sana_export.user_paths import check_unicode

VERBS: dict[str, Verb] = {
    module.VERB.name: module.VERB
    for module in (engines, export, calibrate, build, verify, generate, serve, bench, inspect, push, pull, doctor, variants, synth)
}
#: Log level by the number of -v minus the number of -q. 0 is the verb's own level.
LEVELS = {-1: SILENT, 1: VERBOSE, 2: EVERYTHING}
#: Libraries read their log level from these variables when they are imported.
QUIET_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
NO_PROGRESS_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing to stderr and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"{self.prog} --help")

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        if action.option_strings and action.nargs is None:
            self.with_value.update(action.option_strings)
        return action

    @functools.cached_property
    def with_value(self) -> set[str]:
        """The options that take exactly one value."""
        return set()

    def options(self) -> list[str]:
        """Every option, from the lines of the help that begin with an option."""
        lines = re.findall(r"^  (-\S.*?)(?:  |$)", self.format_help(), re.MULTILINE)
        return re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(lines))

    def joined(self, arguments: Sequence[str]) -> list[str]:
        """`arguments` with "--option=-value" for "--option -value", unless "-value" is an option itself.

        argparse takes a value that begins with a dash only in the first form. Anyone may write a text such as "-ugly".
        """
        known, words = {*self.options()}, list[str]()
        for position, word in enumerate(arguments):
            if word == "--":
                return [*words, *arguments[position:]]
            if words and words[-1] in self.with_value and word.startswith("-") and word.partition("=")[0] not in known:
                words[-1] += f"={word}" if words[-1].startswith("--") else word
            else:
                words.append(word)
        return words

    def stranger(self, arguments: Sequence[str]) -> str | None:
        """The first of `arguments` that looks like an option and is none."""
        known = {*self.options()}
        for word in takewhile(lambda word: word != "--", arguments):
            option = word.partition("=")[0] if word.startswith("--") else word[:2]
            if re.match(r"-(?![\d.]*$)\S+$", word) and option not in known:
                return word
        return None


def main(argv: Sequence[str] | None = None, read: Callable[[Sequence[str]], argparse.Namespace] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return its exit code.

    `read` turns it into the options of a verb (None: `parse`).
    """
    open_streams()
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or bool(os.environ.get("SANA_EXPORT_DEBUG"))
    stdout = Stdout(as_json="--json" in arguments)
    try:
        with interruptible(lambda: _interrupted(stdout)):
            for word in arguments:
                check_unicode(word, "an argument")
            answer = _run((read or parse)(arguments), stdout)
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
        with contextlib.suppress(OSError):  # stdout is full: the text on stderr and the exit code say what is wrong
            stdout.write_json({"error": failure.document, "exit_code": failure.exit_code})
        return failure.exit_code


def _run(options: argparse.Namespace, stdout: Stdout) -> Answer:
    verb = VERBS[options.verb]
    verbosity = max(-1, min(options.verbose - options.quiet, 2))
    console = Console(level=LEVELS.get(verbosity, verb.level))
    variables = {
        **NO_TELEMETRY,
        **(QUIET_ENVIRONMENT if verbosity <= 0 else {}),
        **({} if sys.stderr.isatty() else NO_PROGRESS_BARS),
    }
    with stdout.guarded(), default_environment(variables), logging_to(console, everything=verbosity > 0):
        return verb.run(options, console)


def parse(arguments: Sequence[str], prog: str = "sana-export") -> argparse.Namespace:
    """The options of a command line after the words `prog`.

    Raises UsageError, which suggests the most similar option if one is unknown.
    """
    parser, verbs = make_parser(prog)
    verb = next((word for word in arguments if word in verbs), None)
    return parser.parse_args(arguments) if verb is None else parse_with(parser, arguments, verbs[verb])


def parse_with(parser: Parser, arguments: Sequence[str], verb: Parser | None = None) -> argparse.Namespace:
    """The options that `parser` reads. `verb` is the parser of the verb in `arguments`; None if `parser` has no verbs.

    Raises UsageError, as `parse` does.
    """
    own = verb or parser
    words = own.joined(arguments)
    if stranger := own.stranger(words):
        raise _unrecognized(stranger, words, parser, own)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        raise _unrecognized(unknown[0], words, parser, own)
    return options


def _unrecognized(word: str, words: Sequence[str], parser: Parser, verb: Parser) -> UsageError:
    known = verb.options()
    option = word.partition("=")[0]
    near = [name for name in known if name.startswith(option) and option.startswith("--")]
    near = near or difflib.get_close_matches(option, known, n=1)
    fix = f"{verb.prog} --help"
    if not near and word.startswith("-") and word in words:
        position = words.index(word)
        fix = " ".join([parser.prog, shlex.join([*words[:position], *words[position + 1 :], "--", word])])
    wanted = f"{near[0]}?" if near else "an option, or -- before a text that begins with a dash" if word.startswith("-") else None
    return UsageError(f"unrecognized argument {word!r}", wanted=wanted, fix=fix)


def make_parser(prog: str = "sana-export") -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and the parsers of the verbs by name."""
    parser = Parser(
        prog=prog,
        description="Exports a Sana checkpoint to ONNX graphs, builds TensorRT engines and generates images without PyTorch.",
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
        add_output_options(verbs[verb.name])
    return parser, verbs


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that every verb has."""
    group: Any = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON document on stdout and everything else on stderr")
    group.add_argument(
        "-q", "--quiet", action="count", default=0, help="print nothing but errors on stderr; the result stays on stdout"
    )
    group.add_argument("-v", "--verbose", action="count", default=0, help="print more on stderr; twice for everything")
    group.add_argument("--debug", action="store_true", help="print the traceback of an error")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr is closed
        sys.stderr.write(f"sana-export: {text}\n")


def _interrupted(stdout: Stdout) -> None:
    _say("interrupted")
    stdout.write_json({"error": {"type": "KeyboardInterrupt", "message": "interrupted"}, "exit_code": INTERRUPTED})


if __name__ == "__main__":
    raise SystemExit(main())
