"""The source files that an export depends on, and facts about installed packages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from sana_export import environment
from sana_export.environment import PACKAGE, import_digest, imported_files, installed_version, release
from sana_export.export.bundle import export_key
from sana_export.manifest import Options


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package's source, which the digests use."""
    copy = shutil.copytree(
        PACKAGE, tmp_path / "sana_export", ignore=lambda _, names: [n for n in names if n in ("models", "__pycache__")]
    )
    monkeypatch.setattr(environment, "PACKAGE", copy)
    import_digest.cache_clear()
    yield copy
    import_digest.cache_clear()


def key() -> str:
    import_digest.cache_clear()
    return export_key(SimpleNamespace(sha256="0" * 64), Options("fp16", clamp=False), ["sampler"])


def key_after(package: Path, changed: str) -> str:
    """The key of an export after a comment is added to the file `changed`."""
    with (package / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    return key()


@pytest.mark.parametrize(
    "changed",
    [
        "contract.py",
        "manifest.py",
        "formats/dtypes.py",
        "checkpoint/fold_lora.py",
        "graphs/denoiser.py",
        "graphs/__init__.py",
        "export/bundle.py",
        "export/onnx.py",
        "synth/weights.py",  # imported inside a function of checkpoint/
    ],
)
def test_a_changed_file_that_the_export_imports_changes_its_key(package: Path, changed: str) -> None:
    before = key()
    assert key_after(package, changed) != before


@pytest.mark.parametrize(
    "changed", ["cli/main.py", "bench/run.py", "verify/bundle.py", "runtime/pipeline.py", "trt/plan.py", "__init__.py"]
)
def test_a_changed_file_of_anything_else_does_not(package: Path, changed: str) -> None:
    before = key()
    assert key_after(package, changed) == before


def test_every_kind_of_import_is_followed(tmp_path: Path) -> None:
    sources = {
        "__init__": "def __getattr__(name):\n    from p.unused import it\n",
        "top": "import os\nimport p.a\nfrom p import b\nfrom p.c import value\nfrom p.folder import d\nfrom other import p\n",
        "a": "def later():\n    from p.e import value\n",
        "b": "import p.top\n",
        "c": "value = 1\n",
        "e": "value = 1\n",
        "unused": "it = 1\n",
        "folder/__init__": "",
        "folder/d": "",
    }
    for name, text in sources.items():
        file = tmp_path / "p" / f"{name}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    assert imported_files("p.top", tmp_path) == {
        "p/top.py", "p/a.py", "p/b.py", "p/c.py", "p/e.py", "p/folder/__init__.py", "p/folder/d.py"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.11.0+cu130", (2, 11, 0)),
        ("10.12.0.36", (10, 12, 0, 36)),
        ("5.0rc1", (5, 0)),
        ("2.9.0.dev20250901", (2, 9, 0)),
        ("3", (3,)),
        ("unknown", ()),
    ],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers


def test_releases_compare_as_numbers() -> None:
    assert release("2.11.0+cu130") > release("2.9") > release("2.8.9")


@pytest.mark.parametrize(
    ("installed", "module", "asked"),
    [
        ("tensorrt_cu12", "tensorrt", "tensorrt"),
        ("tensorrt_cu13", "tensorrt", "tensorrt"),
        ("tensorrt_rtx_cu13", "tensorrt_rtx", "tensorrt-rtx"),
    ],
)
def test_tensorrt_is_installed_under_any_name_that_brings_its_module(
    installed: str, module: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").touch()
    about = tmp_path / f"{installed}-99.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {installed}\nVersion: 99.1.0\n")
    (about / "top_level.txt").write_text(f"{module}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_version(asked) == "99.1.0"
    assert installed_version("onnxruntime") is None


def test_installed_version() -> None:
    assert installed_version("numpy") == metadata.version("numpy")
    assert installed_version("no-such-distribution") is None
