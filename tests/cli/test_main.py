"""Every result and every error of a verb becomes output and an exit code in one place."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sana_export
from sana_export import __version__
from sana_export.cli import main as module
from sana_export.cli.main import VERBS
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import Answer, Verb
from sana_export.errors import ArtifactError, DependencyError, ParityError, UsageError
from tests.support.command_line import Cli, command

DOCUMENTED = (
    "engines",
    "export",
    "calibrate",
    "build",
    "verify",
    "generate",
    "serve",
    "bench",
    "inspect",
    "push",
    "pull",
    "doctor",
    "variants",
    "synth",
)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the work of `variants` with a function without arguments that returns an `Answer` or raises."""

    def replace(work: Callable[[], Any], level: int = logging.WARNING) -> None:
        def run(options: argparse.Namespace, console: Console) -> Answer:
            return work()

        fake = Verb("variants", "", "", "", lambda parser: None, run, level)
        monkeypatch.setitem(module.VERBS, "variants", fake)

    return replace


def raising(error: BaseException) -> Callable[[], Any]:
    def work() -> Any:
        raise error

    return work


def test_the_documented_verbs_exist() -> None:
    assert tuple(VERBS) == DOCUMENTED


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_verb_has_help_with_an_example(name: str, cli: Cli) -> None:
    ran = cli(name, "--help")
    assert ran.code == 0
    assert f"example:\n  sana-export {name}" in ran.out
    for option in ("--json", "--quiet", "--verbose", "--debug"):
        assert option in ran.out


def test_examples_parse() -> None:
    import shlex

    for verb in VERBS.values():
        for line in verb.example.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "sana-export"
            assert module.parse(arguments).verb == verb.name


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"sana-export {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong"), 2),
        (DependencyError("lacking"), 3),
        (ArtifactError("damaged"), 4),
        (ParityError("apart"), 5),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "/bundle/x"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/bundle/x"), 3),
        (MemoryError(), 3),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 3),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3),
        (ModuleNotFoundError("No module named 'onnx_ir.passes'", name="onnx_ir.passes"), 3),
        (ModuleNotFoundError("No module named 'sana_export.nothing'", name="sana_export.nothing"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "/bundle/x"), 1),
        (KeyError("layers"), 1),
        (RecursionError(), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int, verb: Callable[..., None], cli: Cli) -> None:
    verb(raising(error))
    ran = cli("variants")
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("sana-export: ")
    assert "Traceback" not in ran.err
    ran = cli("variants", "--json")
    assert ran.code == ran.json["exit_code"] == code
    assert ran.json["error"]["type"]


def test_an_error_says_found_wanted_and_fix(verb: Callable[..., None], cli: Cli) -> None:
    verb(raising(ArtifactError("it is stale", found="version 1", wanted="version 2", fix="sana-export build")))
    assert cli("variants").err == (
        "sana-export: error: it is stale\n  found:  version 1\n  wanted: version 2\n  fix:    sana-export build\n"
    )
    document = cli("variants", "--json").json
    assert document == {
        "error": {
            "type": "ArtifactError",
            "message": "it is stale",
            "found": "version 1",
            "wanted": "version 2",
            "fix": "sana-export build",
        },
        "exit_code": 4,
    }


@pytest.mark.parametrize("with_flag", [True, False])
def test_the_traceback_of_a_bug_is_shown_only_on_request(
    with_flag: bool, verb: Callable[..., None], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb(raising(KeyError("layers")))
    quiet = cli("variants")
    assert "KeyError: 'layers'" in quiet.err
    assert "report" in quiet.err
    assert "Traceback" not in quiet.err
    if not with_flag:
        monkeypatch.setenv("SANA_EXPORT_DEBUG", "1")
    loud = cli("variants", *(["--debug"] if with_flag else []))
    assert loud.code == 1
    assert "Traceback" in loud.err


def test_an_unknown_option_suggests_the_most_similar_one(cli: Cli) -> None:
    ran = cli("generate", "bundle", "a cat", "-o", "x.png", "--hieght", "64")
    assert ran.code == 2
    assert "'--hieght'" in ran.err
    assert "wanted: --height?" in ran.err
    assert "sana-export generate --help" in ran.err
    assert "wanted: --output?" in cli("generate", "bundle", "a cat", "-o", "x.png", "--ouput", "y.png").err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["exprot"],
        ["export"],
        ["export", "tiny-random"],
        ["generate", "bundle", "a cat", "-o", "x.png", "--steps", "0"],
        ["generate", "bundle", "a cat", "-o", "x.png", "--height", "6.5"],
        ["export", "tiny-random", "-o", "x", "--dtype", "int8"],
        ["build", "bundle", "--backend", "openvino"],
        ["variants", "--js"],
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], cli: Cli) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("sana-export: error: ")
    assert "--help" in ran.err


def test_a_usage_error_of_the_parser_is_json_too(cli: Cli) -> None:
    ran = cli("export", "--json")
    assert ran.code == ran.json["exit_code"] == 2
    assert "MODEL" in ran.json["error"]["message"]


def test_stdout_holds_the_answer_alone() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", noisy_program()], capture_output=True, text=True, timeout=60, check=True, env=buffered
    )
    assert done.stdout == '{\n "value": 1\n}\n'
    assert "a library speaks" in done.stderr
    assert "native code speaks" in done.stderr


def noisy_program() -> str:
    return (
        "import os, sys\n"
        "from sana_export.cli import main as module\n"
        "from sana_export.cli.verb import Answer, Verb\n"
        "def run(options, console):\n"
        "    print('a library speaks')\n"
        "    os.write(1, b'native code speaks\\n')\n"
        "    return Answer({'value': 1}, 'text')\n"
        "module.VERBS['variants'] = Verb('variants', '', '', '', lambda parser: None, run)\n"
        "sys.exit(module.main(['variants', '--json']))\n"
    )


def test_a_closed_pipe_is_not_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(command("variants"), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert process.returncode == 0
    assert process.stderr == ""


def test_text_that_stdout_cannot_encode_is_escaped() -> None:
    program = noisy_program().replace("'text'", "'panda \\U0001f43c'").replace(", '--json'", "")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == b"panda \\U0001f43c\n"


@pytest.mark.parametrize(
    ("flags", "level", "shown"),
    [
        ([], logging.WARNING, {"warning", "error"}),
        ([], logging.INFO, {"info", "warning", "error"}),
        (["-q"], logging.INFO, {"error"}),
        (["-v"], logging.WARNING, {"info", "warning", "error"}),
        (["-vv"], logging.WARNING, {"debug", "info", "warning", "error"}),
    ],
)
def test_verbosity(flags: list[str], level: int, shown: set[str], verb: Callable[..., None], cli: Cli) -> None:
    def work() -> Answer:
        log = logging.getLogger("sana_export.somewhere")
        for name in ("debug", "info", "warning", "error"):
            getattr(log, name)("this is %s", name)
        return Answer({}, "")

    verb(work, level)
    err = cli("variants", *flags).err
    assert {name for name in ("debug", "info", "warning", "error") if f"this is {name}" in err} == shown
    assert "warning: this is warning" in err or "warning" not in shown


def test_other_packages_are_silent_unless_asked_for(verb: Callable[..., None], cli: Cli) -> None:
    def work() -> Answer:
        warnings.warn("deprecated somewhere", stacklevel=1)
        logging.getLogger("transformers").warning("something about a config")
        return Answer({}, "")

    verb(work)
    with warnings.catch_warnings():
        assert cli("variants").err == ""


def test_log_handlers_are_removed(verb: Callable[..., None], cli: Cli) -> None:
    verb(lambda: Answer({}, ""))
    before = list(logging.getLogger("sana_export").handlers)
    for _ in range(3):
        cli("variants")
    assert logging.getLogger("sana_export").handlers == before


@pytest.mark.parametrize("flags", [[], ["-v"], ["-q"]])
def test_levels_and_environment_are_restored(
    flags: list[str], verb: Callable[..., None], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "info")
    loggers = [logging.getLogger(name) for name in ("sana_export", "transformers", "httpx")]
    before = dict(os.environ), [logger.level for logger in loggers]
    seen: dict[str, str | None] = {}

    def work() -> Answer:
        seen.update({name: os.environ.get(name) for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")})
        return Answer({}, "")

    verb(work)
    cli("variants", *flags)
    assert seen == {"TRANSFORMERS_VERBOSITY": None if flags == ["-v"] else "error", "DIFFUSERS_VERBOSITY": "info"}
    assert (dict(os.environ), [logger.level for logger in loggers]) == before


def test_the_callers_signal_handlers_are_restored(verb: Callable[..., None], cli: Cli) -> None:
    def own(number: int, frame: object) -> None:
        """The caller's own handler."""

    before = {number: signal.signal(number, own) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        verb(raising(KeyboardInterrupt()))
        cli("variants")
        assert [signal.getsignal(number) for number in before] == [own, own]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


STUBBORN = (
    "import sys, time\n"
    "from sana_export.cli import main as module\n"
    "from sana_export.cli.terminal import interrupt\n"
    "from sana_export.cli.verb import Answer, Verb\n"
    "interrupt.GRACE_SECONDS = 0.5\n"
    "def run(options, console):\n"
    "    console.line('started')\n"
    "    for _ in range(100):\n"
    "        try:\n"
    "            time.sleep(0.2)\n"
    "        except BaseException:\n"
    "            pass\n"
    "    return Answer({}, 'not interrupted')\n"
    "module.VERBS['variants'] = Verb('variants', '', '', '', lambda parser: None, run)\n"
    "sys.exit(module.main(['variants', '--json']))\n"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_is_swallowed_still_ends_the_command(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - started < 5
    assert err == "sana-export: interrupted\n"
    assert json.loads(out) == {"error": {"type": "KeyboardInterrupt", "message": "interrupted"}, "exit_code": 130}


def test_python_m_imports_nothing_from_the_current_folder(tmp_path: Path, bundle: Path) -> None:
    """A folder or file of the user's may have the name of a module."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('the file of the user')")
    environment = {**os.environ, "PYTHONPATH": str(Path(sana_export.__file__).parent.parent)}
    done = subprocess.run(command("inspect", bundle, "--json"), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
