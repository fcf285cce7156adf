"""`--quantize` on the command line: what it refuses, and what `inspect` and `build` say of a quantized bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sana_export.manifest import Manifest
from tests.support.command_line import Cli
from tests.support.quantized import quantized_bundle_in


@pytest.fixture(scope="module")
def quantized(tiny_bundle: Path, tiny_checkpoint: Any, build_cache: Path) -> Path:
    return quantized_bundle_in(build_cache, tiny_bundle, tiny_checkpoint)


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["vae_decoder=nvfp4"], ["vae_decoder does not take nvfp4", "--quantize vae_decoder=int8-weight"]),
        (["int8-weight,unet=int8-weight"], ["nothing of 'unet' can be quantized"]),
        (["vae_encoder=int8-weight"], ["the graph vae_encoder is not exported"]),
    ],
)
def test_wrong_schemes_write_nothing(cli: Cli, tmp_path: Path, words: list[str], texts: list[str]) -> None:
    ran = cli("export", "tiny-random", "-o", tmp_path / "bundle", "--quantize", *words)
    assert ran.code == 2
    assert all(text in ran.err for text in texts), ran.err
    assert not [*tmp_path.iterdir()]


def test_inspect_says_how_weights_are_stored(cli: Cli, quantized: Path) -> None:
    ran = cli("inspect", quantized)
    rows = {line.split()[0]: line.split()[-1] for line in ran.out.splitlines() if line.startswith("  ")}
    assert ran.code == 0
    assert (rows["graph"], rows["text_encoder"], rows["denoiser"], rows["context"]) == (
        "weights",
        "int8-weight",
        "int4-weight",
        "fp32",
    )
    assert "embeddings in int8-weight, text_encoder in int8-weight, denoiser in int4-weight" in " ".join(ran.out.split())
    document = json.loads(cli("inspect", quantized, "--json").out)
    assert document["options"]["quantize"]["denoiser"] == "int4-weight"
    assert document["graphs"]["denoiser"]["quantized_weights"] == 21  # seven in each of three blocks
    assert document["graphs"]["context"]["quantized_weights"] == 0


def test_build_refuses_a_target_before_it_compiles(cli: Cli, quantized: Path) -> None:
    ran = cli("build", quantized, "--backend", "tensorrt-rtx", "--compute-capability", "7.5")
    assert ran.code == 2
    assert "tensorrt-rtx has no int4 for compute capability 7.5" in ran.err
    assert f"fix:    sana-export export tiny-random -o {quantized} --dtype fp32" in ran.err
    assert "--quantize embeddings=int8-weight,text_encoder=int8-weight,denoiser=int8-weight" in ran.err
    assert not (quantized / "engines").exists()


@pytest.fixture
def blackwell(quantized: Path, tmp_path: Path) -> Path:
    """A bundle whose manifest says that its text encoder and denoiser are in NVFP4."""
    own = tmp_path / "blackwell"
    shutil.copytree(quantized, own)
    manifest = Manifest.load(own)
    schemes = {**manifest.options.quantize, "text_encoder": "nvfp4", "denoiser": "nvfp4"}
    options = dataclasses.replace(manifest.options, quantize=schemes, quantize_method=("search", "low-rank=4"))
    dataclasses.replace(manifest, options=options).save(own)
    return own


def test_the_command_for_another_target_replaces_every_scheme_that_lacks_it(cli: Cli, blackwell: Path) -> None:
    ran = cli("build", blackwell, "--backend", "tensorrt-rtx", "--compute-capability", "8.9")
    assert ran.code == 2
    schemes = "embeddings=int8-weight,text_encoder=int8-weight,denoiser=int8-weight"
    assert f"--quantize {schemes} --quantize-method search\n" in ran.err, "no scheme is left that takes low-rank"


def test_inspect_names_the_gpus_that_engines_can_be_built_for(cli: Cli, blackwell: Path, quantized: Path) -> None:
    command = f"sana-export build {blackwell} --backend tensorrt-rtx --compute-capability 12.0 12.1"
    assert f"to build some: {command}\n" in cli("inspect", blackwell).out
    refused = cli("build", blackwell, "--backend", "tensorrt-rtx")
    assert (refused.code, command in refused.err) == (2, True)
    assert f"to build some: sana-export build {quantized} --backend tensorrt-rtx\n" in cli("inspect", quantized).out
