"""Sampling, and every verb that does not need PyTorch, leaves it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnxscript", "safetensors", "tensorrt", "tensorrt_rtx")


def heavy_modules(program: str) -> set[str]:
    """The roots of `HEAVY` that a fresh interpreter holds after `program`."""
    report = f"\nimport json, sys\nsys.stderr.write('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def line(*arguments: object) -> str:
    """A program that runs the command line `arguments` and fails unless it succeeds."""
    return (
        "from sana_export.cli.main import main\n"
        "try:\n"
        f"    code = main({[str(argument) for argument in arguments]!r})\n"
        "except SystemExit as end:\n"
        "    code = end.code or 0\n"
        "assert code == 0, code\n"
    )


def test_the_check_finds_what_is_there() -> None:
    assert heavy_modules("import safetensors, onnx") == {"safetensors", "onnx"}


@pytest.mark.parametrize(
    "program",
    [
        "import sana_export",
        "import sana_export.runtime",
        "from sana_export import SanaRuntime",
        "import sana_export.cli.main",
        line("--help"),
        line("export", "--help"),
        line("doctor"),
        line("variants", "--json"),
    ],
)
def test_light(program: str) -> None:
    assert heavy_modules(program) == set()


def test_generate_and_inspect_are_light(tiny_bundle: Path, tmp_path: Path) -> None:
    assert heavy_modules(line("inspect", tiny_bundle)) == set()
    output = tmp_path / "x.png"
    size = ("--height", 64, "--width", 64, "--no-resolution-binning")
    assert heavy_modules(line("generate", tiny_bundle, "a cat", "-o", output, "--steps", 1, *size)) == set()
    assert output.is_file()
