"""`verify --polygraphy`: real commands of Polygraphy on the files, and profiles that are those of the engines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from polygraphy.json import load_json

from sana_export.contract import GraphSpec
from sana_export.errors import DependencyError, UsageError
from sana_export.manifest import Manifest
from sana_export.profiles import PROFILES
from sana_export.trt.build import input_shapes
from sana_export.trt.plan import profile_ranges
from sana_export.verify import layer_engines, polygraphy_files, polygraphy_package
from sana_export.verify.bundle import Sampling
from sana_export.verify.layer_sides import SideChoice
from sana_export.verify.polygraphy_files import write_polygraphy_files
from sana_export.verify.polygraphy_package import build_options
from sana_export.verify.polygraphy_scripts import GraphCommands, scripts

SHORT = Sampling(("a red apple",), 128, 128, 2)


@pytest.fixture(scope="module")
def written(img2img_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a bundle whose folder needs quotes."""
    folder = tmp_path_factory.mktemp("polygraphy")
    bundle = folder / "a bundle's copy"
    shutil.copytree(img2img_bundle, bundle)
    found = write_polygraphy_files(bundle, folder / "out", SHORT, threads=1)
    assert set(found.graphs) == set(Manifest.load(bundle).graphs)
    assert {path.name for path in (folder / "out").iterdir()} == {*found.graphs, *found.scripts, "polygraphy.json"}
    return folder / "out"


def run_script(script: Path, graph: str) -> subprocess.CompletedProcess[str]:
    """Run one graph's command with Polygraphy of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["sh", str(script), graph], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("sh") is None, reason="needs a POSIX shell")
def test_polygraphys_own_commands(written: Path) -> None:
    inspected = run_script(written / "inspect.sh", "denoiser")
    assert inspected.returncode == 0
    assert "Name: denoiser | ONNX Opset:" in inspected.stdout
    assert inspected.stdout.count("==== ONNX Model ====") == 1, "one graph"
    ran = run_script(written / "onnxruntime.sh", "denoiser")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"SNR: [\d.]+ dB \(min required: 57 dB\) \| PASSED", ran.stdout)

    results = RunResults.load(str(written / "denoiser/outputs.json"))
    values = results["float32"][0]["noise_pred"]
    results["float32"][0]["noise_pred"] = values * np.float32(1.02)
    results.save(str(written / "denoiser/outputs.json"))
    wrong = run_script(written / "onnxruntime.sh", "denoiser")
    assert wrong.returncode == 1
    assert re.search(r"SNR: 33\.9\d* dB \(min required: 57 dB\) \| FAILED", wrong.stdout + wrong.stderr)


def test_saved_inputs_and_outputs_are_those_of_the_graph(written: Path, img2img_runtime: Any) -> None:
    for graph in ("blend", "vae_encoder_tail", "vae_decoder_tail", "postprocess"):
        (feeds,) = load_json(str(written / graph / "inputs.json"))
        spec = img2img_runtime.manifest.graphs[graph].spec
        assert list(feeds) == [tensor.name for tensor in spec.inputs]
        saved = RunResults.load(str(written / graph / "outputs.json"))["float32"][0]
        for name, value in img2img_runtime.run(graph, feeds).items():
            assert np.allclose(saved[name], img2img_runtime.to_host(value), atol=1 if graph == "postprocess" else 1e-4)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engines_get_the_shapes_of_the_profile(backend: str, written: Path) -> None:
    content = json.loads((written / "polygraphy.json").read_text())
    manifest = Manifest.load(Path(content["bundle"]))
    assert content["profile"] == "default"
    script = (written / f"{backend}.sh").read_text()
    assert ("export POLYGRAPHY_USE_TENSORRT_RTX=1" in script) is (backend == "tensorrt-rtx")
    ranges = profile_ranges(manifest, PROFILES["default"], polygraphy_files.read_instruction_tokens(Path(content["bundle"])))
    for graph, entry in manifest.graphs.items():
        (line,) = (line for line in script.splitlines() if f"in {graph})" in line)
        for index, kind in enumerate(("min", "opt", "max")):
            found = re.search(rf"--trt-{kind}-shapes ((?:'[^']+' ?)+)", line)
            wanted = {name: list(shapes[index]) for name, shapes in input_shapes(entry.spec, ranges).items()}
            texts = re.findall(r"'(\w+):(\[[\d,]+\])'", found[1] if found else "")
            assert {name: json.loads(shape) for name, shape in texts} == wanted


def test_scripts_of_the_bundles_engines_and_of_bfloat16() -> None:
    graph = GraphCommands("sampler", "onnx/sampler/model.onnx", {}, {}, {"tensorrt": "engines/tensorrt/key/sampler.engine"})
    found = scripts(Path("/x y"), [graph], 37.0, "float16")
    assert "engines-tensorrt-rtx.sh" not in found
    command = 'polygraphy run "$BUNDLE"/engines/tensorrt/key/sampler.engine --load-inputs sampler/inputs.json'
    assert f"case ${{1:-sampler}} in sampler) {command}" in found["engines-tensorrt.sh"]
    # Our engines have no memory of their own: polygraphy_runner in bench/gpu_check/judge.py says the same.
    assert " --trt --model-type engine --allocation-strategy runtime " in found["engines-tensorrt.sh"]
    assert "BUNDLE=${BUNDLE:-'/x y'}" in found["engines-tensorrt.sh"]
    windows = found["engines-tensorrt.cmd"].split("\r\n")
    assert r'if "%GRAPH%"=="sampler" polygraphy run "%BUNDLE%\engines\tensorrt\key\sampler.engine"' in windows[-3]
    assert not [name for name in scripts(Path("/b"), [graph], 24.0, "bfloat16") if "onnxruntime" in name]


def test_onnx_runtime_is_not_asked_to_run_what_it_has_no_kernels_for() -> None:
    graphs = [
        GraphCommands(name, f"onnx/{name}/model.onnx", {}, {}, {}, kernels=name != "denoiser") for name in ("sampler", "denoiser")
    ]
    both, one = scripts(Path("/b"), graphs, 24.0, "float32"), scripts(Path("/b"), graphs[1:], 24.0, "float32")
    assert "--onnxrt" in both["onnxruntime.sh"]
    assert {name for name, text in both.items() if "onnx/denoiser/model.onnx" in text and "--onnxrt" in text} == set()
    assert {name for name in one if name.endswith(".sh")} == {"inspect.sh", "tensorrt.sh", "tensorrt-rtx.sh"}


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("sh") is None, reason="needs a POSIX shell")
def test_a_graph_without_a_command_is_an_error(tmp_path: Path) -> None:
    graphs = [GraphCommands(name, f"onnx/{name}/model.onnx", {}, {}, {}) for name in ("sampler", "denoiser")]
    texts = scripts(tmp_path, graphs, 37.0, "float16")
    (tmp_path / "inspect.sh").write_text(texts["inspect.sh"])
    for name in ("denoisr", "denoiser sampler", "*"):
        ran = run_script(tmp_path / "inspect.sh", name)
        assert ran.returncode == 2
        assert ran.stderr == f"no command for {name}, only for sampler, denoiser\n"
    windows = texts["inspect.cmd"].split("\r\n")
    assert windows.index('if "%~1"=="denoiser" set KNOWN=1') < windows.index(
        "if not defined KNOWN echo no command for %~1, only for sampler, denoiser 1>&2 & exit /b 2"
    )


@pytest.mark.parametrize("flag", [True, False])
def test_all_networks_are_strongly_typed(flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 11 has no flag for it, and Polygraphy ends with an error if it is asked for one that does not exist."""
    flags = SimpleNamespace(**({"STRONGLY_TYPED": 1} if flag else {}))
    monkeypatch.setattr(polygraphy_package, "load", lambda backend: SimpleNamespace(NetworkDefinitionCreationFlag=flags))
    asked: list[bool] = []

    class Trt:
        Profile = SimpleNamespace

        @staticmethod
        def network_from_onnx_path(path: str, *, strongly_typed: bool) -> Any:
            asked.append(strongly_typed)
            raise DependencyError("no GPU")

    monkeypatch.setattr(layer_engines, "polygraphy_trt", lambda **_: Trt)
    found = scripts(Path("/b"), [GraphCommands("sampler", "onnx/sampler/model.onnx", {}, {}, {})], 37.0, "float16")
    for backend in ("tensorrt", "tensorrt-rtx"):
        own = ["--use-gpu"] if backend == "tensorrt-rtx" else []
        words = ["--trt", *(["--strongly-typed"] if flag else []), *own]
        assert SideChoice(backend, "float16").runner == words
        assert f" {' '.join(words)} " in found[f"{backend}.sh"]
        assert f" {' '.join(words)} " in found[f"reduce-{backend}.sh"]
        with pytest.raises(DependencyError, match="no GPU"):
            layer_engines.MarkedEngine(Path("x"), GraphSpec("x", (), ()), {}, [], rtx=backend == "tensorrt-rtx")
    assert asked == [flag, flag]
    assert SideChoice("auto", "bfloat16").runner == SideChoice("tensorrt", "bfloat16").runner


def test_strong_typing_is_asked_for_if_the_version_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build_options("tensorrt") == ["--trt", "--strongly-typed"]


def test_the_folder_is_written_whole_or_not_at_all(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something that is not files for Polygraphy") as caught:
        write_polygraphy_files(tiny_bundle, tmp_path / "mine", SHORT)
    assert caught.value.fix == f"--polygraphy {tmp_path / 'mine-2'}"
    with pytest.raises(UsageError, match="profile static-1024x512 does not cover the inputs") as caught:
        write_polygraphy_files(tiny_bundle, tmp_path / "out", SHORT, profile="static-1024x512", threads=1)
    assert caught.value.fix == "--height 1024 --width 512"

    def fail(*_: Any) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(polygraphy_files, "scripts", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        write_polygraphy_files(tiny_bundle, tmp_path / "out", SHORT, threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
