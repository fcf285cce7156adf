"""`inspect`: what is in a bundle, and for every engine each reason why it cannot run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.cli.main import parse
from sana_export.cli.verbs import inspect as verb
from sana_export.contract import GRAPH_GROUPS
from sana_export.files import file_entry
from sana_export.gpu_support import RTX_CAPABILITIES, RTX_PORTABLE
from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.trt.compatibility import incompatibilities
from tests.support.command_line import Cli
from tests.support.engine_entries import ADA, ENGINE, HOPPER, THERE

#: Fields of an engine for the full TensorRT.
FULL = {"backend": "tensorrt", "backend_version": "11.0", "operating_system": "linux-x86_64"}
#: Reasons for a portable engine on an RTX 20, and for TensorRT-RTX on an H100.
NOT_PORTABLE = f"compute_capabilities: built for portable ({', '.join(RTX_PORTABLE)}), here is 7.5"
NOT_ON_HOPPER = f"TensorRT-RTX does not support compute capability 9.0, only {', '.join(RTX_CAPABILITIES)}"


@pytest.mark.parametrize(
    ("engine", "host", "reasons"),
    [
        ({}, {}, []),
        ({"compute_capabilities": ("8.9", "12.0")}, {}, []),
        ({}, {"gpus": ()}, ["no NVIDIA GPU and driver here"]),
        ({}, {"gpus": (HOPPER, ADA)}, []),
        ({}, {"gpus": (HOPPER,)}, [f"{NOT_ON_HOPPER} (NVIDIA H100)"]),
        (
            {},
            {"gpus": (Gpu("old", "7.5"),)},
            [NOT_PORTABLE],
        ),
        ({"compute_capabilities": ("7.5",)}, {"gpus": (Gpu("old", "7.5"),)}, []),
        ({"compute_capabilities": ("12.0",)}, {}, ["compute_capabilities: built for 12.0, here is 8.9"]),
        ({"backend_version": "1.6"}, {}, ["backend_version: built with TensorRT-RTX 1.6, here is 1.7.1"]),
        ({}, {"versions": {}}, ['TensorRT-RTX is not installed (pip install "tensorrt-rtx>=1.7")']),
        (
            {
                "backend": "tensorrt",
                "backend_version": "11.0",
                "operating_system": "windows-amd64",
                "compute_capabilities": ("8.9",),
            },
            {},
            ["operating_system: built on windows-amd64, here is linux-x86_64"],
        ),
        (
            {"backend_version": "1.6", "compute_capabilities": ("12.0",)},
            {},
            [
                "backend_version: built with TensorRT-RTX 1.6, here is 1.7.1",
                "compute_capabilities: built for 12.0, here is 8.9",
            ],
        ),
        ({"backend_version": "1.6", "options": {"version_compatible": True}}, {}, []),
        (
            {"backend_version": "2.0", "options": {"version_compatible": True}},
            {},
            ["backend_version: built with TensorRT-RTX 2.0, here is 1.7.1"],
        ),
        ({**FULL, "compute_capabilities": ("8.0",), "options": {"hardware_compatible": True}}, {"gpus": (HOPPER,)}, []),
        ({**FULL, "compute_capabilities": ("8.0",)}, {"gpus": (HOPPER,)}, ["compute_capabilities: built for 8.0, here is 9.0"]),
        (
            {"compute_capabilities": ("8.0",), "options": {"hardware_compatible": True}},
            {"gpus": (Gpu("old", "7.5"),)},
            ["compute_capabilities: built for 8.0 and later, here is 7.5"],
        ),
        ({"backend": "openvino"}, {}, ["backend openvino is not known to this version of sana-export"]),
    ],
)
def test_reasons(engine: dict[str, Any], host: dict[str, Any], reasons: list[str]) -> None:
    assert incompatibilities(dataclasses.replace(ENGINE, **engine), dataclasses.replace(THERE, **host)) == reasons


def with_engine(bundle: Path, content: bytes = b"engine") -> None:
    path = bundle / ENGINE.file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    Manifest.load(bundle).with_engine(dataclasses.replace(ENGINE, file=file_entry(bundle, path))).save(bundle)


def test_document(bundle_copy: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(bundle_copy)
    monkeypatch.setattr(verb, "detect_host", lambda: THERE)
    ran = cli("inspect", bundle_copy, "--json")
    manifest = Manifest.load(bundle_copy)
    assert ran.code == 0
    assert ran.json["checkpoint"]["sha256"] == manifest.checkpoint.sha256
    plain = {"quantize": {}, "quantize_method": [], "calibration": "", "calibration_file": ""}
    assert ran.json["options"] == {"precision": "fp32", "clamp": False, "pag_layers": [1], **plain}
    assert set(ran.json["graphs"]) == set(GRAPH_GROUPS["default"])
    files = [path for path in bundle_copy.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert ran.json["bytes"] == sum(path.stat().st_size for path in files)
    assert ran.json["runs_here"] == {"onnx": True, "engines": True}
    (engine,) = ran.json["engines"]
    assert (engine["graph"], engine["runs_here"], engine["reasons"]) == ("sampler", True, [])


def test_text_names_what_cannot_run_and_why(bundle_copy: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(bundle_copy)
    monkeypatch.setattr(verb, "detect_host", lambda: dataclasses.replace(THERE, gpus=(HOPPER,)))
    ran = cli("inspect", bundle_copy)
    assert ran.code == 0
    assert f"{NOT_ON_HOPPER} (NVIDIA H100) (1 of 1 engines)" in ran.out
    assert "synthetic" in ran.out
    assert "profile default: batch 1 to 4, latent_height 4 to 64, latent_width 4 to 64" in ran.out


def test_a_damaged_engine(bundle_copy: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(bundle_copy)
    (bundle_copy / ENGINE.file.path).write_bytes(b"another engine")
    monkeypatch.setattr(verb, "detect_host", lambda: THERE)
    ran = cli("inspect", bundle_copy, "--json")
    assert ran.code == 4
    assert ran.json["engines"][0]["damaged"].startswith(f"{ENGINE.file.path} is damaged")
    assert ran.json["runs_here"] == {"onnx": True, "engines": False}


def test_an_engines_build_time_memory_size_and_weights(bundle_copy: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle_copy / ENGINE.file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine")
    entry = dataclasses.replace(
        ENGINE,
        file=file_entry(bundle_copy, path),
        options={"tf32": False, "refittable": True},
        build_seconds=12.34,
        build_peak_bytes=1_455_000_000,
    )
    Manifest.load(bundle_copy).with_engine(entry).save(bundle_copy)
    monkeypatch.setattr(verb, "detect_host", lambda: THERE)
    (engine,) = cli("inspect", bundle_copy, "--json").json["engines"]
    assert (engine["build_seconds"], engine["build_peak_bytes"], engine["file"]["bytes"]) == (12.34, 1_455_000_000, 6)
    text = cli("inspect", bundle_copy).out
    assert re.search(r"sampler +tensorrt-rtx 1\.7\.1 +portable +default, refittable +6 bytes +12\.3 s +1\.5 GB +yes", text)


def test_gpu_memory_that_the_engines_need(bundle_copy: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle_copy / ENGINE.file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine")
    entry = dataclasses.replace(
        ENGINE,
        file=dataclasses.replace(file_entry(bundle_copy, path)),
        ranges={**ENGINE.ranges, "branches": (1, 2, 3)},
        activation_bytes=5 * 10**9,
    )
    Manifest.load(bundle_copy).with_engine(entry).save(bundle_copy)
    gpu = dataclasses.replace(ADA, memory_bytes=4 << 30)
    monkeypatch.setattr(verb, "detect_host", lambda: dataclasses.replace(THERE, gpus=(gpu,)))
    need = cli("inspect", bundle_copy, "--json").json["memory"]["tensorrt-rtx"]["resident"]
    # Latents of 4 images, 32 channels, 64x64: noise_pred three times, seven others once.
    assert (need["weights"], need["work"]) == (6, 5 * 10**9)
    assert need["tensors"] == (3 + 7) * 4 * 32 * 64 * 64 * 4 + 8 * 4 + 3 * 4
    assert need["total"] == need["weights"] + need["work"] + need["tensors"]
    assert re.search(r"tensorrt-rtx, resident +6 bytes +5\.0 GB +5\.0 GB +no", cli("inspect", bundle_copy).out)
    assert re.search(r"tensorrt-rtx, staged +6 bytes +5\.0 GB", cli("doctor", bundle_copy).out)
    assert cli("doctor", bundle_copy, "--json").json["memory"]["tensorrt-rtx"]["staged"]["work"] == 5 * 10**9


@pytest.mark.parametrize(
    ("folder", "fix"),
    [
        ("my-checkpoint", "sana-export export my-checkpoint -o my-checkpoint-bundle"),
        ("some where/my-checkpoint", "sana-export export 'some where/my-checkpoint' -o 'some where/my-checkpoint-bundle'"),
        ("tiny-random", "sana-export export ./tiny-random -o tiny-random-bundle"),  # not the alias
    ],
)
def test_a_checkpoint_instead_of_a_bundle(
    folder: str, fix: str, tiny_checkpoint: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint.folder, folder)
    ran = cli("inspect", folder, "--json")
    assert ran.code == 4
    assert ran.json["error"] == {
        "type": "ArtifactError",
        "message": f"{folder} is a checkpoint, not a bundle",
        "found": "model_index.json",
        "wanted": "manifest.json, in a folder made by `sana-export export`",
        "fix": fix,
    }
    options = parse(shlex.split(fix)[1:])
    assert Path(open_checkpoint(options.model).folder) == Path(folder)


def test_the_checkpoint_in_the_current_folder(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sana").mkdir()
    (tmp_path / "sana/model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "sana")
    assert cli("inspect", ".", "--json").json["error"]["fix"] == f"sana-export export . -o {tmp_path / 'sana-bundle'}"
