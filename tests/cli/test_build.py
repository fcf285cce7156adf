"""`build` and `export` through the command line: what is made, and what is already there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli

from sana_export.cli.build import choose_profile
from sana_export.cli.verb import split_names
from sana_export.manifest import Manifest

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("values", "names"),
    [(["8.9", "12.0"], ["8.9", "12.0"]), (["8.9,12.0"], ["8.9", "12.0"]), (["a, b c", ",d"], ["a", "b", "c", "d"])],
)
def test_names_by_blanks_or_commas(values: list[str], names: list[str]) -> None:
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

    again = cli(*arguments, "--height", 256, "--width", 512, "--batch", 2, "--compute-capability", "8.9,12.0")
    assert again.code == 0
    assert "sampler (" not in again.err
    assert "8.9, 12.0" in again.out
    assert len(Manifest.load(bundle_copy).engines) == 1


def test_a_compute_capability_that_cannot_be_built_for(tiny_bundle: Path, cli: Cli) -> None:
    ran = cli("build", tiny_bundle, "--backend", "tensorrt-rtx", "--compute-capability", "9.0")
    assert ran.code == 2
    assert "8.9" in ran.err


def test_tensorrt_says_what_to_install(tiny_bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ran = cli("build", tiny_bundle, "--backend", "tensorrt")
    assert ran.code == 3
    assert 'pip install "tensorrt>=10.12"' in ran.err


def test_the_profile_is_named_or_of_one_size(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    assert choose_profile(manifest, None, None, None, None).name == "default"
    assert choose_profile(manifest, "laptop", None, None, None).name == "laptop"
    assert choose_profile(manifest, None, 256, None, None).covered(manifest.model) == ((256, 512),)
    assert choose_profile(manifest, None, None, None, 4).batch == (1, 4, 4)


def test_export_of_what_is_already_there_keeps_it(tiny_checkpoint: Any, bundle_copy: Path, cli: Cli) -> None:
    before = (bundle_copy / "manifest.json").stat().st_mtime_ns
    options = ("--dtype", "fp32", "--pag-layers", "transformer_blocks.1")
    ran = cli("export", tiny_checkpoint.folder, "-o", bundle_copy, *options, "--json")
    assert ran.code == 0, ran.err
    assert "up to date" in ran.err
    assert ran.json["options"] == {"precision": "fp32", "clamp": False, "pag_layers": [1]}
    assert set(ran.json["graphs"]) == set(Manifest.load(bundle_copy).graphs)
    assert (bundle_copy / "manifest.json").stat().st_mtime_ns == before
