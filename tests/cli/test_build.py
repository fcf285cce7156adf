"""`build` and `export` on the command line: what they make, and what they skip because it exists."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from sana_export.cli.terminal.text import size
from sana_export.cli.verb import split_names
from sana_export.cli.verbs.build import choose_profile
from sana_export.machine import gpu_compute_capability
from sana_export.manifest import Manifest
from sana_export.resolutions import BINS
from tests.support.command_line import Cli

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("values", "names"),
    [(["8.9", "12.0"], ["8.9", "12.0"]), (["8.9,12.0"], ["8.9", "12.0"]), (["a, b c", ",d"], ["a", "b", "c", "d"])],
)
def test_names_are_separated_by_spaces_or_commas(values: list[str], names: list[str]) -> None:
    assert split_names(values) == names


def test_engines_of_one_size_for_two_gpus(bundle_copy: Path, cli: Cli) -> None:
    arguments = ("build", bundle_copy, "--backend", "tensorrt-rtx", "--graphs", "sampler")
    ran = cli(*arguments, "--height", 256, "--width", 512, "--batch", 2, "--compute-capability", "8.9", "12.0", "--json")
    assert ran.code == 0, ran.err
    (engine,) = ran.json["engines"]
    assert engine["compute_capabilities"] == ["8.9", "12.0"]
    assert engine["ranges"]["latent_height"] == [8, 8, 8]
    assert engine["ranges"]["latent_width"] == [16, 16, 16]
    assert engine["ranges"]["batch"] == [1, 2, 2]
    assert "[1/1] sampler (missing)" in ran.err
    (recorded,) = Manifest.load(bundle_copy).engines
    assert (bundle_copy / recorded.file.path).stat().st_size == engine["file"]["bytes"]
    assert 50e6 < engine["build_peak_bytes"] == recorded.build_peak_bytes < 2e9

    again = cli(*arguments, "--height", 256, "--width", 512, "--batch", 2, "--compute-capability", "8.9,12.0")
    assert again.code == 0
    assert "sampler (" not in again.err
    assert "8.9, 12.0" in again.out
    assert "peak memory" in again.out
    assert size(recorded.build_peak_bytes) in again.out
    assert len(Manifest.load(bundle_copy).engines) == 1


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def test_a_dry_run_lists_what_would_be_built_and_why_and_builds_nothing(bundle_copy: Path, cli: Cli) -> None:
    arguments = ("build", bundle_copy, "--backend", "tensorrt-rtx", "--graphs", "sampler", "context", "denoiser", "postprocess")
    assert cli(*arguments[:4], "--graphs", "sampler", "context", "denoiser").code == 0
    engines = {engine.graph: engine for engine in Manifest.load(bundle_copy).engines}
    (bundle_copy / engines["context"].file.path).write_bytes(b"another engine")
    stale = dataclasses.replace(engines["denoiser"], key="0" * 64, backend_version="1.6")
    manifest = Manifest.load(bundle_copy)
    others = tuple(engine for engine in manifest.engines if engine.graph != "denoiser")
    dataclasses.replace(manifest, engines=(*others, stale)).save(bundle_copy)
    before = contents(bundle_copy)

    ran = cli(*arguments, "--dry-run", "--json")

    assert ran.code == 0, ran.err
    found = {engine["graph"]: engine for engine in ran.json["engines"]}
    version = engines["sampler"].backend_version
    assert {graph: engine["reason"].split(": ")[0] for graph, engine in found.items()} == {
        "sampler": "exists",
        "context": "damaged",
        "denoiser": "stale",
        "postprocess": "missing",
    }
    assert found["denoiser"]["reason"] == f"stale: backend_version was 1.6, is {version}"
    assert found["denoiser"]["supersedes"] == [stale.file.path]
    assert [graph for graph, engine in found.items() if engine["exists"]] == ["sampler"]
    assert (found["sampler"]["key"], found["sampler"]["path"]) == (engines["sampler"].key, engines["sampler"].file.path)
    assert contents(bundle_copy) == before

    text = cli(*arguments, "--dry-run")
    assert text.code == 0
    assert "3 engines of 4 to build" in text.out
    for engine in found.values():
        assert any(engine["key"][:12] in line and engine["reason"] in line for line in text.out.splitlines())
    assert contents(bundle_copy) == before


def test_a_dry_run_of_refittable_engines(tiny_bundle: Path, cli: Cli) -> None:
    arguments = ("build", tiny_bundle, "--backend", "tensorrt-rtx", "--graphs", "sampler", "denoiser", "--dry-run", "--json")
    with_weights, without = (cli(*arguments, *more).json["engines"] for more in ((), ("--refittable",)))
    keys = [{engine["graph"]: engine["key"] for engine in engines} for engines in (with_weights, without)]

    assert keys[0]["sampler"] == keys[1]["sampler"]
    assert keys[0]["denoiser"] != keys[1]["denoiser"]
    assert {engine["graph"]: engine["options"] for engine in without} == {
        "sampler": {"tf32": False},
        "denoiser": {"tf32": False, "refittable": True},
    }


@pytest.mark.skipif(gpu_compute_capability() is not None, reason="there is a GPU")
def test_a_refittable_engine_cannot_be_built_without_a_gpu(bundle_copy: Path, cli: Cli) -> None:
    ran = cli(
        "build", bundle_copy, "--backend", "tensorrt-rtx", "--graphs", "context", "--refittable", "--profile", "static", "--json"
    )
    assert ran.code == 3
    assert ran.json["error"]["type"] == "DependencyError"
    assert "a machine with an NVIDIA GPU" in ran.json["error"]["fix"]
    assert Manifest.load(bundle_copy).engines == ()


def test_a_compute_capability_that_cannot_be_built_for(tiny_bundle: Path, cli: Cli) -> None:
    ran = cli("build", tiny_bundle, "--backend", "tensorrt-rtx", "--compute-capability", "9.0")
    assert ran.code == 2
    assert "8.9" in ran.err


def test_tensorrt_says_what_to_install(tiny_bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ran = cli("build", tiny_bundle, "--backend", "tensorrt")
    assert ran.code == 3
    assert 'pip install "tensorrt>=10.13"' in ran.err


def test_a_profile_by_name_or_for_one_size(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    assert choose_profile(manifest, None, None, None, None).name == "default"
    assert choose_profile(manifest, "laptop", None, None, None).name == "laptop"
    assert choose_profile(manifest, None, 256, None, None).covered(manifest.model) == ((256, 512),)
    assert choose_profile(manifest, None, None, None, 4).batch == (1, 4, 4)


def test_engines_of_one_size_and_of_every_bin(tiny_bundle: Path, cli: Cli) -> None:
    manifest = Manifest.load(tiny_bundle)
    exact = choose_profile(manifest, "static-832x1216", None, None, None)
    assert (exact.name, exact.covered(manifest.model)) == ("static-832x1216", ((832, 1216),))
    assert choose_profile(manifest, "static-1024", None, None, None).covered(manifest.model) == ((1024, 1024),)
    arguments = ("build", tiny_bundle, "--backend", "tensorrt-rtx", "--dry-run")
    ran = cli(*arguments, "--each-bin", "--graphs", "context", "denoiser", "--json")
    assert ran.code == 0, ran.err
    found = [(engine["graph"], engine["profile"]) for engine in ran.json["engines"]]
    sizes = set(BINS[manifest.model.sample_size].values())
    assert [graph for graph, _ in found].count("context") == 1, "it does not depend on the size"
    assert {profile for graph, profile in found if graph == "denoiser"} == {
        f"static-{height}" if height == width else f"static-{height}x{width}" for height, width in sizes
    }
    assert cli(*arguments, "--each-bin", "--profile", "laptop").code == 2
    refused = cli(*arguments, "--profile", "static-1000")
    assert refused.code == 2
    assert "multiples of 32" in refused.err


def test_compatibility_options(bundle_copy: Path, cli: Cli) -> None:
    arguments = ("build", bundle_copy, "--backend", "tensorrt-rtx", "--graphs", "sampler", "--json")
    plain = cli(*arguments)
    more = cli(*arguments, "--hardware-compatible", "--weight-streaming", "--compute-capability", "8.0")
    assert (plain.code, more.code) == (0, 0), more.err
    engines = Manifest.load(bundle_copy).engines
    assert [dict(engine.options) for engine in engines] == [
        {"tf32": False},
        {"tf32": False, "hardware_compatible": True, "weight_streaming": True},
    ]
    assert all(engine.activation_bytes >= 0 for engine in engines)
    lean = cli(*arguments, "--version-compatible")
    assert lean.code == 3
    assert "leave out --version-compatible" in lean.err
    assert len(Manifest.load(bundle_copy).engines) == 2


def test_exporting_again_keeps_the_bundle(tiny_checkpoint: Any, bundle_copy: Path, cli: Cli) -> None:
    before = (bundle_copy / "manifest.json").stat().st_mtime_ns
    options = ("--dtype", "fp32", "--pag-layers", "transformer_blocks.1")
    ran = cli("export", tiny_checkpoint.folder, "-o", bundle_copy, *options, "--json")
    assert ran.code == 0, ran.err
    assert "up to date" in ran.err
    plain = {"quantize": {}, "quantize_method": [], "calibration": "", "calibration_file": ""}
    assert ran.json["options"] == {"precision": "fp32", "clamp": False, "pag_layers": [1], **plain}
    assert set(ran.json["graphs"]) == set(Manifest.load(bundle_copy).graphs)
    assert (bundle_copy / "manifest.json").stat().st_mtime_ns == before
