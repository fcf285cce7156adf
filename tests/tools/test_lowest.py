"""The environment of the lowest versions: what is in it, and which of its tests are skipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sana_export.trt.flavour import FLAVOURS
from tools.bindings import VERSIONS
from tools.lowest import ENVIRONMENTS, ROOT, requirements

PROJECT = """[project]
dependencies = ["numpy>=1.26", "tokenizers>=0.20"]
[project.optional-dependencies]
cpu = ["onnxruntime>=1.26"]
tensorrt-rtx = ["tensorrt-rtx>=1.7"]
export = ["torch>=2.9"]
dev = ["ruff>=0.9", "peft>=0.18"]
"""
WANTED = {
    "runtime": [
        "numpy==1.26",
        "tokenizers==0.20",
        "onnxruntime==1.26",
        "tensorrt-rtx==1.7.*",
        "onnx",
        "pytest",
        "psutil",
        "hypothesis",
    ],
    "export": ["numpy==1.26", "onnxruntime==1.26", "torch==2.9", "peft==0.18", "pytest", "psutil", "hypothesis"],
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_requirements_are_the_lowest_versions(environment: str, tmp_path: Path) -> None:
    project = tmp_path / "project.toml"
    project.write_text(PROJECT)
    assert [*requirements(environment, project)] == WANTED[environment]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_requirement_of_the_project_has_a_lowest_version(environment: str) -> None:
    found = [*requirements(environment)]
    assert {line for line in found if "==" not in line} == set(ENVIRONMENTS[environment].testing)


def test_errors_name_the_lowest_version() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for flavour in FLAVOURS.values():
        (lowest,) = set(re.findall(rf'"{flavour.backend}>=([\d.]+)"', project))
        assert flavour.install == f'pip install "{flavour.backend}>={lowest}"'
        assert flavour.backend != "tensorrt" or VERSIONS[0].startswith(f"{lowest}.")  # which is the one that is recorded


def test_only_what_needs_the_missing_packages_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'numpy'):\n"
        "            raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    (tmp_path / "test_whole.py").write_text("import torch\ndef test_a(): ...\n")
    (tmp_path / "test_parts.py").write_text(
        "def test_torch(): import torch\n"
        "def test_numpy(): import numpy\n"
        "def test_wrong(): assert 'torch' == 1\n"
        "def test_right(): assert True\n"
    )
    command = (sys.executable, "-m", "pytest", "-p", "tests.support.runtime_only", "--rootdir", tmp_path, tmp_path)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "2 failed, 1 passed, 2 skipped" in done.stdout, done.stdout
