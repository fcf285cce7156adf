"""A child process of our own code sees the modules that its parent sees, and nothing that only lies in the current folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sana_export.child_process import run_module, start_module

REPORT = """
import json, os, sys
told = {"path": sys.path, "arguments": sys.argv[1:], "color": os.environ.get("COLOR"), "place": os.environ["PLACE"]}
print(json.dumps(told))
"""


@pytest.fixture
def reporting(tmp_path, monkeypatch):
    """A module that only this process's changed `sys.path` leads to; the current folder is another one."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "reports_itself.py").write_text(REPORT, "utf-8")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('a file in the current folder replaced a module')", "utf-8")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("PLACE", "kept")
    return "reports_itself"


def test_the_child_has_its_parents_path_and_variables(reporting):
    done = run_module(reporting, "one", "two words", environment={"COLOR": "red"}, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    folders = [entry for entry in dict.fromkeys(sys.path) if Path(entry).is_absolute()]
    assert [entry for entry in told["path"] if entry in folders] == folders
    assert told["path"][0] == folders[0]
    assert (told["arguments"], told["color"], told["place"]) == (["one", "two words"], "red", "kept")


def test_a_started_child_is_a_process_to_wait_for(reporting):
    process = start_module(reporting, stdout=subprocess.PIPE, encoding="utf-8")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(output)["color"] is None


def test_an_empty_entry_is_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("print('found')", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert run_module("only_here", capture_output=True, text=True, check=True).stdout.strip() == "found"


def test_an_exit_code_is_handed_on(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("raise SystemExit(7)", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_module("fails").returncode == 7
