"""sana_export's commands in the real optimum-cli: which there are, how words are passed on, and what optimum's options become."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sana_export.cli.main import parse
from sana_export.cli.optimum_commands import OPTIMUM_OPTIONS, ExportSana, translated
from sana_export.errors import UsageError
from tests.support.command_line import Cli, Ran

optimum_cli = pytest.importorskip("optimum.commands.optimum_cli")

ROOT = Path(__file__).parents[2]
#: The options of `optimum-cli export onnx` that concern diffusion models (optimum-onnx 0.1.0, optimum/commands/export/onnx.py).
ONNX_OPTIONS = (
    *("-m", "--model", "--task", "--opset", "--device", "--dtype", "--optimize", "--monolith", "--no-post-process", "--variant"),
    *("--framework", "--atol", "--cache_dir", "--trust-remote-code", "--pad_token_id", "--library-name", "--model-kwargs"),
    *("--no-dynamic-axes", "--no-constant-folding", "--slim", "--dynamo", "--batch_size", "--sequence_length", "--width"),
    *("--height", "--num_channels"),
)


@pytest.fixture
def optimum(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `optimum-cli ARGUMENTS...` in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            optimum_cli.main()
        except SystemExit as end:
            code = end.code
        return Ran(code or 0, *capsys.readouterr())

    return run


def exported(*words: str) -> dict[str, Any]:
    return vars(ExportSana.read(words))


def ours(*words: str) -> dict[str, Any]:
    return vars(parse(["export", *words]))


def test_optimum_lists_the_commands(optimum: Cli) -> None:
    assert re.search(r"^ +sana +Export, build", optimum("--help").out, re.MULTILINE)
    assert re.search(r"^ +sana +Export a Sana", optimum("export", "--help").out, re.MULTILINE)


def test_the_wheel_has_the_file_that_optimum_searches_for() -> None:
    discovery = pytest.importorskip("setuptools.discovery")
    found = discovery.PEP420PackageFinder.find(str(ROOT), include=["sana_export*", "optimum.commands.register"])
    assert "optimum.commands.register" in found
    assert not [name for name in found if name in ("optimum", "optimum.commands")]
    assert '"optimum.commands.register"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert [path.name for path in (ROOT / "optimum").rglob("*.py")] == ["register_sana_export.py"]  # no __init__.py


@pytest.mark.parametrize("words", [("variants", "--json"), ("--version",), ("build", "--help")])
def test_a_verb_answers_as_sana_export_does(words: tuple[str, ...], optimum: Cli, cli: Cli) -> None:
    own, passed = cli(*words), optimum("sana", *words)
    assert passed.out.replace("optimum-cli sana", "sana-export").split() == own.out.split()
    assert passed.code == own.code == 0


def test_words_are_passed_on_as_they_are(optimum: Cli, cli: Cli) -> None:
    for words in (["inspect", "no such bundle"], ["generate", "b", "-o", "x.png", "--", "-ugly"], ["generate", "b", "--hlp"], []):
        own, passed = cli(*words), optimum("sana", *words)
        assert (passed.code, passed.err.replace("optimum-cli sana", "sana-export")) == (own.code, own.err)
        assert own.code in (2, 4)


def test_an_export_has_the_options_of_ours() -> None:
    words = ("--dtype", "bf16", "--pag-layers", "1", "2", "--lora", "a:0.5", "--layout", "optimum", "--json", "-v")
    assert exported("--model", "tiny", "out", *words) == ours("tiny", "-o", "out", *words)
    assert exported("-m", "tiny", *words, "out") == ours("tiny", "-o", "out", *words)


def test_an_export_runs_and_fails_as_ours(optimum: Cli, cli: Cli, component_layout: Path) -> None:
    words = ("--layout", "optimum", "--dtype", "fp32", "--json")
    ran = optimum("export", "sana", "--model", "tiny-random", component_layout, *words)
    assert ran.code == 0, ran.err
    assert ran.json == cli("export", "tiny-random", "-o", component_layout, *words).json
    assert [*ran.json["components"]] == ["text_encoder", "transformer", "vae_encoder", "vae_decoder"]
    assert ran.json["layout"] == "optimum"
    unknown = optimum("export", "sana", "--model", "nosuch", "out")
    assert (unknown.code, unknown.err) == (2, cli("export", "nosuch", "-o", "out").err)


def test_help_and_usage_name_the_command(optimum: Cli) -> None:
    ran = optimum("export", "sana", "--help")
    assert ran.code == 0
    assert ran.out.startswith("usage: optimum-cli export sana")
    assert "optimum-cli export sana --model tiny bundle" in ran.out
    ran = optimum("export", "sana", "--model", "tiny")
    assert ran.code == 2
    assert "the following arguments are required: OUT" in ran.err
    assert "optimum-cli export sana --help" in ran.err


def test_options_of_optimum_that_mean_the_same() -> None:
    same = ("--fp16", "--device", "cpu", "--task=text-to-image", "--framework", "pt", "--dynamo", "--cache_dir", "hub", "-o", "out")
    assert exported("--model", "tiny", *same) == ours("tiny", "-o", "out", "--dtype", "fp16", "--cache-dir", "hub")
    assert exported("--model", "tiny", "--pag-layers", "1", "-o", "out") == ours("tiny", "-o", "out", "--pag-layers", "1")
    assert exported("--model", "tiny", "--cache_dir=hub", "--output=out") == ours("tiny", "-o", "out", "--cache-dir", "hub")


@pytest.mark.parametrize("option", ONNX_OPTIONS)
def test_every_option_of_optimum_is_known(option: str, optimum: Cli) -> None:
    """It means the same, or the error names it and says what to do."""
    row = OPTIMUM_OPTIONS.get(option)
    if row is None:
        assert re.search(rf"^  (-m MODEL, )?{option}\b", optimum("export", "sana", "--help").out, re.MULTILINE)
    elif row.words is None:
        with pytest.raises(UsageError, match=option) as caught:
            translated(["--model", "tiny", option, "7", "out"])
        assert caught.value.fix == row.instead != ""


def test_the_opset_in_the_error_is_that_of_an_export() -> None:
    from sana_export.export.onnx import OPSET

    assert f"opset {OPSET}" in OPTIMUM_OPTIONS["--opset"].instead


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--pag-layers", "1"], "--pag-layers with --layout optimum"),
        (["--quantize", "int8-weight"], "--quantize with --layout optimum"),
        (["--graphs", "img2img", "--controlnet", "c"], "--graphs, --controlnet with --layout optimum"),
    ],
)
def test_options_that_only_bundles_have_are_refused(words: list[str], named: str, cli: Cli, optimum: Cli, tmp_path: Path) -> None:
    words = ["-o", str(tmp_path / "out"), "--layout", "optimum", *words]
    for ran in (cli("export", "tiny-random", *words), optimum("export", "sana", "--model", "tiny-random", *words)):
        assert ran.code == 2
        assert named in ran.err
    assert not any(tmp_path.iterdir())
