"""`build_bundle` with the real TensorRT-RTX compiler, in its child process."""

import dataclasses
import sys
from pathlib import Path

import onnx
import pytest

from sana_export.errors import ArtifactError
from sana_export.files import check_files, file_entry
from sana_export.machine import Gpu
from sana_export.manifest import EngineEntry, Manifest
from sana_export.profiles import custom_profile
from sana_export.trt import bundle as bundle_module
from sana_export.trt import flavour
from sana_export.trt.bundle import read_instruction_tokens
from sana_export.trt.flavour import load
from sana_export.trt.options import BuildOptions
from sana_export.trt.plan import PlannedEngine
from tests.support.engine_builds import build, built_graphs, paths, tree
from tests.support.small_bundles import model_info, write_bundle, write_instruction


def test_every_engine_is_built_recorded_and_laid_out(bundle: Path) -> None:
    wanted = paths(bundle)
    manifest = build(bundle)

    assert manifest == Manifest.load(bundle)
    assert {entry.graph: entry.file.path for entry in manifest.engines} == wanted
    version = load("tensorrt-rtx").__version__
    for entry in manifest.engines:
        assert check_files(bundle, [entry.file], fix="") == [bundle / wanted[entry.graph]]
        assert b"trt" in (bundle / entry.file.path).read_bytes()[:4]
        assert (entry.backend, entry.backend_version) == ("tensorrt-rtx", version)
        assert (entry.compute_capabilities, entry.operating_system, entry.profile) == ((), "any", "default")
        assert entry.options == {"tf32": False}
        assert 0 < entry.build_seconds < 60
        assert 50e6 < entry.build_peak_bytes < 2e9
    ranges = {entry.graph: entry.ranges for entry in manifest.engines}
    assert ranges["vae_decoder"] == {"batch": (1, 1, 4), "latent_height": (4, 16, 32), "latent_width": (4, 16, 32)}
    assert set(ranges["sampler"]) == {"batch", "branches", "latent_height", "latent_width"}
    inside = {path.relative_to(bundle).as_posix() for path in (bundle / "engines").rglob("*") if path.is_file()}
    assert inside == set(wanted.values())


def test_a_second_build_builds_nothing_and_another_target_only_adds(bundle: Path) -> None:
    built: list[str] = []
    first = build(bundle, on_engine=built_graphs(built))
    before = tree(bundle)

    assert build(bundle, on_engine=built_graphs(built)) == first
    assert built == ["sampler", "vae_decoder"]
    assert tree(bundle) == before

    second = build(bundle, compute_capabilities=("8.9",), graphs=["sampler"], on_engine=built_graphs(built))
    assert built[2:] == ["sampler"]
    assert [entry.compute_capabilities for entry in second.engines] == [(), (), ("8.9",)]
    assert tree(bundle).items() >= {name: data for name, data in before.items() if name != "manifest.json"}.items()


def test_a_stale_engine_is_built_again_and_its_file_goes(bundle: Path) -> None:
    old = {entry.graph: entry for entry in build(bundle).engines}
    write_bundle(bundle, seed=1)
    reasons: list[str] = []

    def note(planned: PlannedEngine, entry: EngineEntry | None) -> None:
        reasons.append(f"{planned.spec.graph} {planned.reason}")

    engines = build(bundle, on_engine=note).engines
    new = {entry.graph: entry for entry in engines}

    assert {reason.split(" was ")[0] for reason in reasons} == {
        "sampler stale: onnx_sha256",
        "vae_decoder stale: onnx_sha256",
    }
    assert len(engines) == len(new) == 2
    for graph, entry in new.items():
        assert entry.key != old[graph].key
        assert not (bundle / old[graph].file.path).parent.exists()
        check_files(bundle, [entry.file], fix="")


def test_a_damaged_engine_is_built_again(bundle: Path) -> None:
    entry = build(bundle, graphs=["sampler"]).engines[0]
    (bundle / entry.file.path).write_bytes(b"damaged")

    again = build(bundle, graphs=["sampler"]).engines
    assert len(again) == 1
    check_files(bundle, [again[0].file], fix="")


def test_a_custom_size_is_recorded_under_its_name(bundle: Path) -> None:
    profile = custom_profile(model_info(), height=256, width=768, batch=2)
    entry = build(bundle, profile=profile, graphs=["vae_decoder"]).engines[0]

    assert entry.profile == "256x768-b2"
    assert entry.ranges == {"batch": (1, 2, 2), "latent_height": (8, 8, 8), "latent_width": (24, 24, 24)}


def test_the_other_flavour_is_the_same_code_with_the_other_module(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tensorrt` may not be installed: a module of its name passes on TensorRT-RTX, and the machine seems to have a GPU."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tensorrt.py").write_text("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(flavour, "gpu_compute_capability", lambda: "9.0")

    manifest = build(bundle, backend="tensorrt", graphs=["sampler"])

    entry = manifest.engines[0]
    assert (entry.backend, entry.compute_capabilities) == ("tensorrt", ("9.0",))
    assert entry.operating_system.startswith(sys.platform)
    assert entry.file.path.startswith("engines/tensorrt/")
    caches = list((bundle / "engines" / "tensorrt").glob("timing-*.cache"))
    assert len(caches) == 1
    assert caches[0].stat().st_size > 0
    sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize(
    ("gpus", "capabilities", "said"),
    [
        ((), (), ""),
        ((Gpu("RTX 4090", "8.9"),), (), ""),
        ((Gpu("RTX 4090", "8.9"), Gpu("H100", "9.0")), (), ""),
        ((Gpu("RTX 2080", "7.5"),), ("7.5", "8.9"), ""),
        ((Gpu("RTX 2080", "7.5"),), (), "(RTX 2080, compute capability 7.5); to run them here, add --compute-capability 7.5"),
        ((Gpu("L4", "8.9"),), ("12.0",), "(L4, compute capability 8.9); to run them here, add --compute-capability 8.9"),
        ((Gpu("H100", "9.0"),), (), "(H100, compute capability 9.0); to run them here, use --backend tensorrt or onnxruntime or "),
    ],
)
def test_whoever_builds_engines_that_do_not_run_here_is_told(
    gpus: tuple[Gpu, ...],
    capabilities: tuple[str, ...],
    said: str,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bundle_module, "find_gpus", lambda: gpus)
    build(bundle, compute_capabilities=capabilities, graphs=[])
    assert ("do not run on the GPU of this machine" in caplog.text) == bool(said)
    assert said in caplog.text


def test_a_hardware_compatible_engine_runs_on_a_later_gpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bundle_module, "find_gpus", lambda: (Gpu("L4", "8.9"),))
    build(bundle, compute_capabilities=("8.0",), graphs=[], options=BuildOptions(hardware_compatible=True))
    assert caplog.text == ""


@pytest.mark.parametrize("tokens", [1, 24, 181])
def test_the_instructions_length_is_read_from_the_bundle(tokens: int, tmp_path: Path) -> None:
    write_bundle(tmp_path, ["sampler"])
    write_instruction(tmp_path, tokens)
    listed = file_entry(tmp_path, tmp_path / "instruction.safetensors")
    dataclasses.replace(Manifest.load(tmp_path), files=(listed,)).save(tmp_path)
    assert read_instruction_tokens(tmp_path) == tokens
    write_instruction(tmp_path, tokens + 1)
    with pytest.raises(ArtifactError, match=r"instruction\.safetensors is damaged"):
        read_instruction_tokens(tmp_path)


def test_a_graph_that_reads_weights_from_elsewhere_is_not_built(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    write_bundle(bundle, ["vae_decoder"])
    manifest = Manifest.load(bundle)
    graph = manifest.graphs["vae_decoder"]
    path, outside = bundle / graph.onnx.path, tmp_path / "secret.data"
    outside.write_bytes((bundle / graph.data[0].path).read_bytes())
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../../../secret.data" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    tampered = dataclasses.replace(graph, onnx=file_entry(bundle, path))
    dataclasses.replace(manifest, graphs={"vae_decoder": tampered}).save(bundle)
    with pytest.raises(ArtifactError, match="a file that does not belong to the bundle") as caught:
        build(bundle)
    assert "secret.data" in str(caught.value.found)
