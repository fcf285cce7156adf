"""The environment of gpu-check: installed packages stay, only missing ones are installed, and a folder of wheels is enough."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import gpu_check as tool

ROOT = Path(__file__).resolve().parents[2]


def write_wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """A wheel with one empty module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(content)}\n")
    files[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("environment")
    (folder / "wheels").mkdir()
    made = tool.Environment(folder / "venv", folder / "wheels")
    made.make()
    return made


def test_what_is_missing() -> None:
    have = {"numpy": "2.4.6", "torch": "2.6.0+cu124", "tokenizers": "0.19", "onnx-ir": "1.0"}
    wanted = ["numpy>=1.26", "torch>=2.9", "tokenizers>=0.20", "onnx_ir", "diffusers>=0.42"]
    assert tool.missing(wanted, have) == ["tokenizers>=0.20", "diffusers>=0.42"], "any version of torch is enough"
    assert tool.missing(["torch>=2.9"], {}) == ["torch>=2.9"]
    names = {requirement.partition(">=")[0] for requirement in tool.required()}
    assert {"numpy", "torch", "diffusers", "transformers", "onnx", "pytest", "nvidia-ml-py"} <= names


def test_it_sees_what_this_interpreter_sees(environment: Any) -> None:
    assert environment.python.is_relative_to(environment.folder)
    seen = subprocess.run([environment.python, "-c", "import torch; print(torch.__file__)"], capture_output=True, text=True)
    assert seen.stdout.strip() == torch.__file__
    assert environment.versions()["torch"] == torch.__version__


def test_wheels_are_installed_into_it_and_nothing_else_changes(environment: Any) -> None:
    write_wheel(environment.wheels, "small_thing", "1.2", "torch")
    before = environment.versions()
    assert environment.install(["small-thing"])
    assert environment.versions() == {**before, "small-thing": "1.2"}
    assert importlib.util.find_spec("small_thing") is None, "this test's own environment is unchanged"
    assert subprocess.run([environment.python, "-c", "import small_thing"]).returncode == 0


def test_torch_is_not_replaced(environment: Any) -> None:
    """Even if a package requires another version and the folder has it."""
    write_wheel(environment.wheels, "torch", "99.0")
    write_wheel(environment.wheels, "greedy", "1.0", "torch>=99")
    assert not environment.install(["greedy"])
    assert environment.versions()["torch"] == torch.__version__
    assert "could not install greedy" in environment.notes[-1]
    assert not environment.install(["not-in-the-folder"])
    assert "not-in-the-folder" in environment.notes[-1]


def test_one_package_that_fails_does_not_keep_out_the_others(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(environment.wheels, "other_thing", "3.0")
    monkeypatch.setattr(tool, "required", lambda: ["nowhere>=1", "other_thing>=2"])
    monkeypatch.setattr(tool, "optional", lambda gpu: [])
    setup = tool.prepare(environment)
    assert setup["installed"] == {"other-thing": "3.0"}
    assert any("could not install nowhere>=1" in note for note in environment.notes)
    assert "installed for this run: other-thing 3.0" in environment.notes


def test_the_engines_packages_are_those_for_the_gpu() -> None:
    def names(gpu: str | None) -> set[str]:
        return {requirement.partition(">=")[0] for requirement in tool.optional(gpu)} - {"cuda-bindings", "cuda-core"}

    assert names(None) == {"tensorrt-rtx"}
    assert names("8.9") == names("12.0") == {"tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx"}
    assert names("8.0") == {"tensorrt-rtx", "tensorrt"}
    assert names("9.0") == names("10.0") == {"tensorrt"}


def test_onnxruntime_is_the_one_for_the_gpu(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may stand beside one that is only seen, never beside one in the same folder."""
    assert "onnxruntime" in environment.versions(), "seen from outside"
    monkeypatch.setattr(environment, "gpu", None)
    assert tool.missing_onnxruntime(environment) == []
    monkeypatch.setattr(environment, "gpu", "8.9")
    (wanted,) = tool.missing_onnxruntime(environment)
    assert wanted.startswith("onnxruntime-gpu[cuda,cudnn]>=")
    write_wheel(environment.wheels, "onnxruntime", "1.99")
    assert environment.install(["onnxruntime==1.99"])
    assert tool.missing_onnxruntime(environment) == []
    assert "has onnxruntime, which excludes onnxruntime-gpu" in environment.notes[-1]
    write_wheel(environment.wheels, "onnxruntime_gpu", "1.99")
    assert environment.install(["onnxruntime-gpu==1.99"])
    environment.notes.clear()
    assert tool.missing_onnxruntime(environment) == []
    assert not environment.notes


def test_cuda_s_libraries_are_those_of_other_packages_if_it_has_none(environment: Any, tmp_path: Path) -> None:
    site = next(path for path in environment.folder.rglob("site-packages") if path.is_dir())
    seen = tmp_path / "packages"
    folders = [seen / "nvidia" / name / "lib" for name in ("cu13", "cudnn")]
    for folder in folders:
        folder.mkdir(parents=True)
    (site / "more.pth").write_text(f"{seen}\n")
    assert set(map(str, folders)) <= set(environment.library_folders())
    (site / "nvidia").mkdir()
    assert environment.library_folders() == []


def test_the_whole_command_without_a_gpu(environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = tmp_path / "r.json"
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", f"VENV={environment.folder}", f"WHEELS={environment.wheels}"]
    flags = f"--work {tmp_path / 'work'} --only find make/600m"
    done = subprocess.run([*command, f"GPU_REPORT={report}", f"GPU_FLAGS={flags}"], cwd=ROOT, capture_output=True, text=True)
    assert "Error 3" in done.stderr, done.stderr
    document = json.loads(report.read_text("utf-8"))
    assert document["exit_code"] == 3
    assert document["parts"]["make/600m"]["reason"] == "no GPU"
    assert document["setup"]["seconds"] <= document["seconds"], "the time of installing counts"
