"""A build that cannot work fails before the compiler starts, or leaves the bundle unchanged."""

import dataclasses
import logging
import os
import sys
import threading
from pathlib import Path

import pytest

from sana_export import files, manifest
from sana_export import files as disk
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.files import partial_path
from sana_export.manifest import Manifest
from sana_export.trt import bundle as bundle_module
from sana_export.trt.bundle import read_instruction_tokens
from tests.support.engine_builds import build, paths, tree
from tests.support.small_bundles import write_bundle


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_damaged_onnx_is_found_before_the_compiler_starts(name: str, damage: str, bundle: Path) -> None:
    path = bundle / "onnx" / "vae_decoder" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content) if damage == "change" else path.unlink()
    before = tree(bundle)

    with pytest.raises(ArtifactError, match=f"vae_decoder/{name}") as caught:
        build(bundle, graphs=["vae_decoder"])

    assert str(caught.value.fix).startswith(f"sana-export export test -o {bundle}")
    assert tree(bundle) == before


def test_an_onnx_that_the_compiler_refuses_is_named_across_the_processes(
    bundle: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.load(bundle)
    decoder = manifest.graphs["vae_decoder"]
    foreign = dataclasses.replace(manifest.graphs["sampler"], onnx=decoder.onnx, data=decoder.data)
    dataclasses.replace(manifest, graphs={"sampler": foreign}).save(bundle)
    before = tree(bundle)

    with caplog.at_level(logging.INFO), pytest.raises(ArtifactError) as caught:
        build(bundle)

    for words in ("onnx/vae_decoder/model.onnx", "not the graph 'sampler'", "noise_pred float32", "fix:"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 4
    assert capfd.readouterr() == ("", "")
    assert tree(bundle) == before


def test_full_disk_while_writing_keeps_the_bundle(bundle: Path) -> None:
    destination = bundle / paths(bundle)["sampler"]
    destination.parent.mkdir(parents=True)
    partial_path(destination).symlink_to("/dev/full")
    before = {name: data for name, data in tree(bundle).items() if not name.endswith(".partial")}

    with pytest.raises(DependencyError, match="disk is full") as caught:
        build(bundle)

    assert "run the same command again" in str(caught.value)
    assert tree(bundle) == before
    assert len(build(bundle).engines) == 2


def test_too_little_space_is_reported_before_the_compiler_starts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1 << 20)
    monkeypatch.setattr(bundle_module, "build_in_child", lambda *args, **options: pytest.fail("compiled"))

    with pytest.raises(DependencyError, match="too little disk space for the engine of sampler"):
        build(bundle)


def test_a_bundle_that_cannot_be_written(bundle: Path) -> None:
    (bundle / "engines").write_text("a file where a folder belongs")

    with pytest.raises(DependencyError, match="cannot be written"):
        build(bundle)
    assert Manifest.load(bundle).engines == ()


def test_a_manifest_that_cannot_be_saved(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole = files.write_whole

    def refuse(path: Path, content: str) -> None:
        path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial").mkdir()
        write_whole(path, content)

    monkeypatch.setattr(manifest, "write_whole", refuse)
    with pytest.raises(DependencyError, match=r"manifest\.json cannot be written"):
        build(bundle, graphs=["sampler"])


def test_usage_errors_come_before_anything_is_built(bundle: Path) -> None:
    before = tree(bundle)
    for options in (
        {"compute_capabilities": ("9.0",)},
        {"graphs": ["denoiser"]},
        {"backend": "onnxruntime"},
    ):
        with pytest.raises(UsageError):
            build(bundle, **options)
    assert tree(bundle) == before


def test_a_missing_package_comes_before_anything_is_built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)

    with pytest.raises(DependencyError, match=r'pip install "tensorrt>=10\.13"'):
        build(bundle, backend="tensorrt")


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"\xff" * 40])
def test_a_damaged_instruction_is_named(content: bytes | None, tmp_path: Path) -> None:
    write_bundle(tmp_path)
    instruction = tmp_path / "instruction.safetensors"
    instruction.unlink() if content is None else instruction.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"instruction\.safetensors is (damaged|missing|not)") as caught:
        read_instruction_tokens(tmp_path)
    assert str(caught.value.fix).startswith(f"sana-export export test -o {tmp_path}")
