"""Sampling, and every verb that does not need PyTorch, does not import it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.imports import heavy_modules, line


def test_the_check_finds_imported_modules() -> None:
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
