"""Damaged and wrong checkpoints and bundles: the documented exit code, an error that names the cause, no traceback."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_export.manifest import FILE_NAME, Manifest
from tests.support.command_line import Cli, Ran


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Any, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint.folder, tmp_path / "checkpoint")


def refused(ran: Ran, code: int, *words: str) -> None:
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    for word in words:
        assert word in ran.err


def test_an_unknown_alias_lists_similar_ones(tmp_path: Path, cli: Cli) -> None:
    ran = cli("export", "sana-1600m-1024", "-o", tmp_path / "bundle")
    refused(ran, 2, "unknown model 'sana-1600m-1024'", "sana-1600m-1024px", "sana-export variants")


def test_a_model_that_is_not_sana(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "flux"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refused(cli("export", folder, "-o", tmp_path / "bundle"), 4, "not a Sana", "FluxPipeline", "SanaPipeline")


def test_a_folder_without_a_checkpoint(tmp_path: Path, cli: Cli) -> None:
    refused(cli("export", tmp_path, "-o", tmp_path / "bundle"), 4, "model_index.json")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_missing_component(component: str, checkpoint_copy: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.rmtree(checkpoint_copy / component)
    refused(cli("export", checkpoint_copy, "-o", tmp_path / "bundle"), 4, component)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_truncated_component(component: str, checkpoint_copy: Path, tmp_path: Path, cli: Cli) -> None:
    (weights,) = (checkpoint_copy / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(cli("export", checkpoint_copy, "-o", tmp_path / "bundle"), 4, weights.name, "damaged or truncated")


def test_a_missing_shard(checkpoint_copy: Path, tmp_path: Path, cli: Cli) -> None:
    (weights,) = (checkpoint_copy / "transformer").glob("*.safetensors")
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    weights.rename(weights.with_name(names[0]))
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (checkpoint_copy / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(cli("export", checkpoint_copy, "-o", tmp_path / "bundle"), 4, "is missing 1 of 2 shards", names[1])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--pag-layers", "transformer_blocks.1,transformer_blocks.30"), "transformer_blocks.0 to transformer_blocks.2"),
        (("--graphs", "denoizer"), "denoiser"),
    ],
)
def test_export_options_that_do_not_fit_the_model(
    options: tuple[str, ...], word: str, tiny_checkpoint: Any, tmp_path: Path, cli: Cli
) -> None:
    refused(cli("export", tiny_checkpoint.folder, "-o", tmp_path / "bundle", *options), 2, word)


def test_an_output_folder_that_is_not_writable(tiny_checkpoint: Any, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused(cli("export", tiny_checkpoint.folder, "-o", tmp_path / "file" / "bundle", "-q"), 3, "cannot be written")
    refused(cli("export", tiny_checkpoint.folder, "-o", "/proc/nowhere/bundle", "-q"), 3, "cannot be written")


def test_an_output_folder_with_other_files_is_not_changed(tiny_checkpoint: Any, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(cli("export", tiny_checkpoint.folder, "-o", tmp_path, "-q"), 2, "not a bundle")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_keeps_the_old_bundle(
    tiny_checkpoint: Any, bundle_copy: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sana_export.export.text_files.save_file", full)
    before = (bundle_copy / FILE_NAME).read_bytes()
    ran = cli("export", tiny_checkpoint.folder, "-o", bundle_copy, "--dtype", "fp32", "-q")
    refused(ran, 3, "disk is full", "bytes free")
    assert (bundle_copy / FILE_NAME).read_bytes() == before
    assert cli("inspect", bundle_copy).code == 0


def cut(bundle: Path) -> str:
    path = bundle / "onnx/denoiser/model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    return "onnx/denoiser/model.onnx"


def flip(bundle: Path) -> str:
    path = bundle / "onnx/vae_decoder/model.onnx.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    return "onnx/vae_decoder/model.onnx.data"


def lose(bundle: Path) -> str:
    (bundle / "onnx/denoiser/model.onnx.data").unlink()
    return "onnx/denoiser/model.onnx.data"


def lose_tokenizer(bundle: Path) -> str:
    (bundle / "tokenizer/tokenizer.json").unlink()
    return "tokenizer/tokenizer.json"


def point_outside(bundle: Path) -> str:
    manifest = Manifest.load(bundle)
    graph = manifest.graphs["denoiser"]
    data = (dataclasses.replace(graph.data[0], path="../secret.data"),)
    graphs = {**manifest.graphs, "denoiser": dataclasses.replace(graph, data=data)}
    dataclasses.replace(manifest, graphs=graphs).save(bundle)
    return "../secret.data"


DAMAGE: list[Callable[[Path], str]] = [cut, flip, lose, lose_tokenizer, point_outside]


@pytest.mark.parametrize("damage", DAMAGE)
def test_generate_refuses_a_damaged_bundle(damage: Callable[[Path], str], bundle_copy: Path, tmp_path: Path, cli: Cli) -> None:
    name = damage(bundle_copy)
    ran = cli("generate", bundle_copy, "a cat", "-o", tmp_path / "x.png", "--steps", 1)
    refused(ran, 4, name, "sana-export export")
    assert not (tmp_path / "x.png").exists()


def test_inspect_refuses_a_manifest_that_leads_outside(bundle_copy: Path, cli: Cli) -> None:
    name = point_outside(bundle_copy)
    refused(cli("inspect", bundle_copy), 4, name, "names a file outside itself", "sana-export export")


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage is not point_outside])
def test_inspect_names_the_damaged_file(damage: Callable[[Path], str], bundle_copy: Path, cli: Cli) -> None:
    intact = cli("inspect", bundle_copy)
    assert (intact.code, "files: all match the manifest" in intact.out) == (0, True)
    name = damage(bundle_copy)
    ran = cli("inspect", bundle_copy, "--json")
    assert ran.code == 4
    assert list(ran.json["damaged"]) == [name]
    assert ran.json["runs_here"]["onnx"] is False
    text = cli("inspect", bundle_copy).out
    assert "files: DAMAGED" in text
    assert f"fix: sana-export export tiny-random -o {bundle_copy} --dtype fp32 --pag-layers transformer_blocks.1" in text


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        path = bundle / FILE_NAME
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))

    return apply


def truncate(bundle: Path) -> None:
    path = bundle / FILE_NAME
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit(export_key="0"), ("edited",)),
        (edit(format=999, tool_version="9.9"), ("another version", "format 999", "9.9")),
        (truncate, ("damaged",)),
        (lambda bundle: (bundle / FILE_NAME).unlink(), ("not a bundle",)),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "generate", "build"])
def test_a_damaged_or_foreign_manifest(
    damage: Callable[[Path], None], words: tuple[str, ...], verb: str, bundle_copy: Path, tmp_path: Path, cli: Cli
) -> None:
    rest = {"generate": ("a cat", "-o", tmp_path / "x.png"), "build": ("--backend", "tensorrt-rtx")}.get(verb, ())
    damage(bundle_copy)
    refused(cli(verb, bundle_copy, *rest), 4, *words)


def test_build_options_that_exclude_each_other(tiny_bundle: Path, cli: Cli) -> None:
    ran = cli("build", tiny_bundle, "--backend", "tensorrt-rtx", "--profile", "laptop", "--height", 512)
    refused(ran, 2, "--profile", "--height")


def test_an_unknown_profile_lists_the_known_ones(tiny_bundle: Path, cli: Cli) -> None:
    ran = cli("build", tiny_bundle, "--backend", "tensorrt-rtx", "--profile", "laptpo")
    refused(ran, 2, "datacenter", "--profile laptop")


def test_verify_needs_a_reference(tiny_bundle: Path, cli: Cli) -> None:
    refused(cli("verify", tiny_bundle), 2, f"sana-export verify {tiny_bundle} --reference tiny-random\n")
    refused(cli("verify", "no-bundle"), 2, "sana-export verify no-bundle --reference MODEL")


def test_bench_needs_a_reference(tiny_bundle: Path, cli: Cli) -> None:
    refused(cli("bench", tiny_bundle), 2, f"sana-export bench {tiny_bundle} --reference tiny-random\n")


def test_an_unknown_workload_lists_the_known_ones(tiny_bundle: Path, tiny_checkpoint: Any, cli: Cli) -> None:
    refused(cli("bench", tiny_bundle, "--reference", tiny_checkpoint.folder, "--workload", "smoek"), 2, "smoke")
