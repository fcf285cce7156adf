"""The public names of `sana_export`, and the packages that importing them loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sana_export
from sana_export.installation import install_command
from tests.support.imports import heavy_modules

TORCH_FREE = ("SanaRuntime", "Request", "build_bundle", "errors", "pull_bundle", "push_bundle", "read_metadata", "save_image")


@pytest.mark.parametrize("name", sana_export.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(sana_export, name)
    assert name == "__version__" or (value.__doc__ or "").strip()


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_runtime_and_the_engine_builder_import_no_torch(name: str) -> None:
    assert heavy_modules(f"from sana_export import {name}") == set()


def test_torch_is_imported_only_by_the_names_that_need_it() -> None:
    assert heavy_modules("import sana_export") == set()
    assert "torch" in heavy_modules("from sana_export import export_bundle")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_checkpoint'"):
        sana_export.load_checkpoint  # noqa: B018
    with pytest.raises(ImportError):
        exec("from sana_export import nothing")


def test_without_the_extra_the_error_names_the_command() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import sana_export\n"
        "try:\n    sana_export.export_bundle\n"
        "except sana_export.errors.DependencyError as error:\n    print(error.fix)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == install_command("export")


def test_dir_lists_the_public_names() -> None:
    assert set(sana_export.__all__) <= set(dir(sana_export))
