"""The command that installs an extra fits how sana_export is installed."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sana_export import installation
from sana_export.installation import install_command

COMMIT = "0123456789abcdef"


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        ({"url": "file:///home/me/sana%20export", "dir_info": {"editable": True}}, 'pip install -e "/home/me/sana export[cpu]"'),
        ({"url": "file:///src/sana", "dir_info": {}}, 'pip install "/src/sana[cpu]"'),
        (
            {"url": "https://example.com/sana.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT, "requested_revision": "v1"}},
            'pip install "sana-export[cpu] @ git+https://example.com/sana.git@v1"',
        ),
        (
            {"url": "https://example.com/sana.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            f'pip install "sana-export[cpu] @ git+https://example.com/sana.git@{COMMIT}"',
        ),
        (
            {"url": "file:///wheels/sana_export-0.1.0-py3-none-any.whl", "archive_info": {}},
            'pip install "sana-export[cpu] @ file:///wheels/sana_export-0.1.0-py3-none-any.whl"',
        ),
        ({"url": "file:///it$/x", "dir_info": {}}, "pip install '/it$/x[cpu]'"),
        (None, 'pip install "sana-export[cpu]"'),
        ([], 'pip install "sana-export[cpu]"'),
    ],
    ids=["editable", "folder", "revision", "commit", "wheel", "quotes", "index", "damaged"],
)
def test_the_place_that_it_came_from(origin: Any, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "site-packages" / "sana_export" / "installation.py"))
    assert install_command("cpu") == wanted


def test_a_source_folder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_command("export", "cpu", "") == f'pip install -e "{Path(__file__).parents[1]}[cpu,export]"'


def test_without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_origin", dict)
    assert install_command() == "pip install sana-export"
