"""`doctor` shows what is installed and how to install the rest; `packages` reads it from metadata."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sana_export.cli import packages
from sana_export.cli.packages import Package, exclusive_conflict, missing_package, require
from sana_export.cli.probe import BackendProbe
from sana_export.cli.verbs import doctor
from sana_export.cli.verbs.doctor import Ability, Machine, judge
from sana_export.errors import DependencyError
from sana_export.installation import install_command
from sana_export.machine import Gpu
from tests.support.command_line import Cli

NO_GPU = Machine("3.11", "python", "Linux", "linux-x86_64", "a processor", 2, 10**9, ())
RTX = BackendProbe("tensorrt-rtx", "1.7.1", ("8.9", "12.0"), None, None)
NO_TENSORRT = BackendProbe("tensorrt", None, (), "no module tensorrt", 'pip install "tensorrt>=10.13"')


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions of the installed packages, as the metadata states them. The test fills it."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    return versions


def abilities(gpus: tuple[Gpu, ...], *probes: BackendProbe, found: list[Package] | None = None) -> dict[str, Ability]:
    here = Machine(**{**vars(NO_GPU), "gpus": gpus})
    return {ability.name: ability for ability in judge(here, found or [], probes)}


def test_document_and_text(cli: Cli) -> None:
    document = cli("doctor", "--json").json
    assert {"sana_export", "machine", "packages", "backends", "abilities", "warnings"} <= set(document)
    found = {package["name"]: package for package in document["packages"]}
    assert found["numpy"]["version"] == metadata.version("numpy")
    assert found["torch"]["extra"] == "export"
    assert "pytest" not in found
    text = cli("doctor").out
    for line in ("export", "sample on the CPU", "build TensorRT-RTX engines", "run TensorRT engines"):
        assert line in text


def test_an_installed_backend_loads(cli: Cli) -> None:
    module = pytest.importorskip("tensorrt_rtx")
    (backend,) = [row for row in cli("doctor", "--json").json["backends"] if row["backend"] == "tensorrt-rtx"]
    assert backend["version"] == module.__version__
    assert "8.9" in backend["compute_capabilities"]


@pytest.mark.parametrize(
    ("gpus", "probe", "builds", "runs", "word"),
    [
        ((), RTX, True, False, "no NVIDIA GPU"),
        ((Gpu("a", "8.9"),), RTX, True, True, None),
        ((Gpu("a", "9.0"),), RTX, True, False, "TensorRT-RTX does not support compute capability 9.0"),
        ((Gpu("a", "9.0"), Gpu("b", "12.0")), RTX, True, True, None),
        ((Gpu("a", "9.0"),), NO_TENSORRT, False, False, "no module tensorrt"),
        ((), BackendProbe("tensorrt", "11.0", (), None, None), False, False, "no NVIDIA GPU"),
        ((Gpu("a", "9.0"),), BackendProbe("tensorrt", "11.0", (), None, None), True, True, None),
    ],
)
def test_engines(gpus: tuple[Gpu, ...], probe: BackendProbe, builds: bool, runs: bool, word: str | None) -> None:
    title = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}[probe.backend]
    found = abilities(gpus, probe)
    assert found[f"build {title} engines"].possible is builds
    run = found[f"run {title} engines"]
    assert run.possible is runs
    assert (run.reason is None) if word is None else (word in str(run.reason))
    assert not runs or run.fix == ("--device 1" if len(gpus) == 2 else None)


def test_what_the_driver_says_without_a_gpu(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpus", lambda: ())
    monkeypatch.setattr(doctor, "find_cuda_error", lambda: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
    text = cli("doctor").out
    assert "none (NVIDIA's driver says CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)" in text
    found = cli("doctor", "--json").json
    assert found["machine"]["cuda_error"] == "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
    for name in ("run TensorRT-RTX engines", "sample on the GPU with ONNX Runtime"):
        assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in found["abilities"][name]["reason"]
    assert "restart the machine" in found["abilities"]["sample on the GPU with ONNX Runtime"]["fix"]


def test_onnxruntime_on_the_gpu(installed: dict[str, str], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sample on the GPU with ONNX Runtime"
    assert abilities(())[name].reason == "no NVIDIA GPU or no driver"
    gpu = Gpu("NVIDIA H100", "9.0")
    assert "onnxruntime-gpu[cuda,cudnn]" in str(abilities((gpu,))[name].fix)
    installed["onnxruntime-gpu"] = "1.31.1"
    assert abilities((gpu,))[name].possible
    monkeypatch.setattr(doctor, "find_gpus", lambda: (gpu,))
    assert "backends for it: tensorrt, onnxruntime, onnxruntime-cuda-graphs, torch, torch-compile" in cli("doctor").out


def test_missing_and_old_packages_are_named_with_the_command_that_installs_them() -> None:
    found = [Package("torch", "export", "2.9", "2.5.1+cu121"), Package("onnx", "export", "1.18", None)]
    ability = abilities((), found=found)["export"]
    assert not ability.possible
    assert ability.reason == "needs torch (older than 2.9), onnx (missing)"
    assert ability.fix == install_command("export")


@pytest.mark.parametrize(
    ("version", "problem"),
    [("2.9", None), ("2.10.1+cpu", None), ("3", None), ("2.8.9", "older than 2.9"), ("2.9rc1", None), (None, "missing")],
)
def test_versions_compare_as_numbers(version: str | None, problem: str | None) -> None:
    assert Package("torch", "export", "2.9", version).problem == problem


def test_two_onnxruntimes_give_a_warning(installed: dict[str, str], cli: Cli) -> None:
    installed["onnxruntime"] = "1.32.0"
    assert exclusive_conflict() is None
    (gpu,) = [package for package in packages.packages() if package.name == "onnxruntime-gpu"]
    assert gpu.install == "pip uninstall -y onnxruntime && " + install_command("cuda")
    installed["onnxruntime-gpu"] = "1.32.0"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(exclusive_conflict())
    assert cli("doctor").out.startswith("warning: onnxruntime and onnxruntime-gpu are installed together")
    assert len(cli("doctor", "--json").json["warnings"]) == 1


@pytest.mark.parametrize("verb", ["export", "verify", "bench", "engines"])
def test_a_verb_names_its_missing_packages(verb: str, installed: dict[str, str], tmp_path: Any, cli: Cli) -> None:
    installed |= {"numpy": "2.0", "pillow": "11.0", "tokenizers": "0.22", "diffusers": "0.42.1", "transformers": "5.0"}
    (tmp_path / "recipe.toml").write_text('model = "tiny-random"\noutput = "x"\n')
    arguments = {
        "export": ("tiny-random", "-o", tmp_path / "bundle"),
        "verify": (tmp_path, "--reference", "tiny-random"),
        "bench": (tmp_path, "--reference", "tiny-random"),
        "engines": (tmp_path / "recipe.toml",),
    }[verb]
    ran = cli(verb, *arguments)
    assert ran.code == 3
    assert "torch missing" in ran.err
    assert "torch>=2.9" in ran.err
    assert "diffusers" not in ran.err
    assert f"fix:    {install_command('export')}" in ran.err


def test_require_accepts_installed_packages() -> None:
    require("", "export")


def test_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert packages.packages() == []
    require("", "export")
    assert missing_package(ModuleNotFoundError("", name="torch")) is None
    assert "packages: sana-export runs from its source folder and is not installed" in cli("doctor").out


def test_commands_name_the_bundle(tiny_bundle: Path, cli: Cli) -> None:
    abilities = cli("doctor", tiny_bundle, "--json").json["abilities"]
    fixes = [ability["fix"] for ability in abilities.values() if ability["fix"]]
    assert all(str(tiny_bundle) in fix for fix in fixes if fix.startswith("sana-export"))
    found = {ability.name: ability for ability in judge(NO_GPU, [], [RTX], "some/bundle")}
    assert found["run TensorRT-RTX engines"].fix == (
        "sana-export generate some/bundle 'a red apple' -o apple.png --backend onnxruntime"
    )


def test_missing_modules() -> None:
    error = missing_package(ModuleNotFoundError("", name="tensorrt_rtx.nothing"))
    assert isinstance(error, DependencyError)
    assert error.fix == install_command("tensorrt-rtx")
    assert missing_package(ModuleNotFoundError("", name="antigravity2")) is None
