"""What a report for others must not say: folders, user, host and addresses. What it must still say: the cause."""

from __future__ import annotations

import getpass
import platform
import sys
import tempfile
from pathlib import Path

import pytest

from sana_export.bench.gpu_check.privacy import Redaction


@pytest.fixture
def redaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Redaction:
    """Of a user jane on the machine janes-laptop, whose work folder, environment and temporary files are outside her home."""
    home = tmp_path / "home" / "jane"
    for folder in (home / "sana", tmp_path / "home" / "janet", tmp_path / "disk" / "j-work", tmp_path / "scratch"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PWD", str(home / "elsewhere"))
    monkeypatch.setenv("SUDO_USER", "boss-of-jane")
    monkeypatch.chdir(home / "sana")
    monkeypatch.setattr(platform, "node", lambda: "janes-laptop.acme.example")
    monkeypatch.setattr(getpass, "getuser", lambda: "jdoe")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "disk" / "j-venv"))
    return Redaction.of_this_machine(tmp_path / "disk" / "j-work")


CASES = {
    "{tmp}/home/jane/sana/tests/x.py:12: in test": "./tests/x.py:12: in test",
    "{tmp}/home/jane/models on janes-laptop": "~/models on this-machine",
    "{tmp}/home/jane/elsewhere/x": "~/elsewhere/x",
    "janes-laptop.acme.example, JANES-LAPTOP": "this-machine, this-machine",
    "jdoe has no access; user=jdoe, boss-of-jane": "user has no access; user=user, user",
    "{tmp}/disk/j-work/parts/tests.log": "$WORK/parts/tests.log",
    "{tmp}/disk/j-venv/lib/python3.12/site-packages/torch/x.py": "$VENV/lib/python3.12/site-packages/torch/x.py",
    "PosixPath('{tmp}/scratch/pytest-of-jdoe/pytest-0/a')": "PosixPath('/tmp/pytest-of-user/pytest-0/a')",
    "file://{tmp}/home/jane/a.onnx": "file:~/a.onnx",
    "[{tmp}/home/jane]": "[~]",
    "gcc -I{tmp}/home/jane/sana -L/home/acme/lib": "gcc -I. -L.../lib",
}


@pytest.mark.parametrize("text", CASES)
def test_names_of_this_machine(text: str, redaction: Redaction, tmp_path: Path) -> None:
    assert redaction.apply(text.format(tmp=tmp_path)) == CASES[text]


def test_the_working_folder_by_a_link(redaction: Redaction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's PWD keeps the link that it went through. It may also be that of another folder: see `elsewhere` above."""
    (tmp_path / "link").symlink_to(Path.cwd())
    monkeypatch.setenv("PWD", str(tmp_path / "link"))
    assert Redaction.of_this_machine(tmp_path / "work").apply(f"{tmp_path}/link/x.py") == "./x.py"


def test_a_folder_whose_name_only_begins_alike(redaction: Redaction, tmp_path: Path) -> None:
    """A part of another user's name would be left over."""
    assert "~" not in redaction.apply(f"{tmp_path}/home/janet/x")


#: Other folders of the machine, which the redaction does not know by name. `/home` and `/opt` exist on every Linux.
ELSEWHERE = {
    "cannot open /home/acme/project-x/model.onnx: denied": "cannot open .../model.onnx: denied",
    "cannot open '/home/acme/project x/model.onnx'": "cannot open '.../model.onnx'",
    'File "/opt/acme/lib/python3.12/site-packages/torch/nn/x.py", line 3': 'File ".../torch/nn/x.py", line 3',
    "file:///opt/acme/x.whl": "file:.../x.whl",
    r"cannot open C:\Users\acme\model.onnx": "cannot open .../model.onnx",
    r"WindowsPath('C:/Users/acme x/model.onnx')": "WindowsPath('.../model.onnx')",
    "https://acme:secret@packages.acme.example:8443/simple/torch": "https://a-host/simple/torch",
    "https://token@pypi.org/simple/torch": "https://pypi.org/simple/torch",
    "HTTPSConnectionPool(host='packages.acme.example', port=443)": "HTTPSConnectionPool(host='a-host', port=443)",
    "no device GPU-1b2c3d4e-1b2c-1b2c-1b2c-1b2c3d4e5f60": "no device GPU-id",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the folders are those of Linux")
@pytest.mark.parametrize("text", ELSEWHERE)
def test_names_of_other_places(text: str, redaction: Redaction) -> None:
    assert redaction.apply(text) == ELSEWHERE[text]


@pytest.mark.parametrize(
    "text",
    [
        "no implementation for node /transformer_blocks.0/attn1/MatMul",
        "libcudnn.so.9 is not in /usr/lib/x86_64-linux-gnu/libcudnn.so.9 or /proc/self/maps",
        "cosine 0.5 (limit 0.99), 1024x1024 px, 3 GB/s and/or 5/8",
        "see https://github.com/NVIDIA/TensorRT/issues/3798",
        "NVIDIA H200, 580.159.04; TensorRT-RTX 1.7.1.116",
    ],
)
def test_causes_stay(text: str, redaction: Redaction) -> None:
    assert redaction.apply(text) == text


def test_every_text_is_reached(redaction: Redaction) -> None:
    assert redaction.apply({"a": ["jdoe", {"b": ("jdoe", 1, None, 2.5)}]}) == {"a": ["user", {"b": ["user", 1, None, 2.5]}]}


def test_common_and_short_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this every "root" and "id" in a report of such a user would be replaced."""
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    monkeypatch.setattr(platform, "node", lambda: "id")
    monkeypatch.setenv("HOME", "/")
    assert Redaction.of_this_machine(tmp_path).apply("the root of id is /") == "the root of id is /"


def test_a_user_without_a_name_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(getpass, "getuser", nobody)
    monkeypatch.setattr(Path, "home", nowhere)
    assert Redaction.of_this_machine(tmp_path).apply("a text") == "a text"
