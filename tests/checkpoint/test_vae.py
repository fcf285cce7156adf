"""An autoencoder in place of the checkpoint's own: where it may be, what is recorded of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC

from sana_export.architectures import LITE
from sana_export.autoencoders import AUTOENCODERS, DECODERS
from sana_export.bench.candidates.eager import open_job
from sana_export.bench.candidates.table import Job
from sana_export.bench.run import _job
from sana_export.bench.workload import load_workload
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.checkpoint.vae import open_vae
from sana_export.commands import model_words
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.bundle import export_key
from sana_export.export.options import choose_options
from sana_export.hub.client import Hub
from sana_export.manifest import Manifest, Options
from sana_export.synth.checkpoint import make_checkpoint
from sana_export.synth.recipes import AUTOENCODER_RECIPES, RECIPES
from sana_export.verify.reference import load_reference
from tests.support.small_bundles import write_bundle


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


@pytest.fixture(scope="module")
def lite(own_cache: None) -> SanaCheckpoint:
    return open_checkpoint("tiny-random", vae="tiny-dc-ae-lite")


@pytest.fixture
def folder(lite: SanaCheckpoint, tmp_path: Path) -> Path:
    """A folder with nothing but an autoencoder, without the marker of a synthetic one."""
    assert lite.vae is not None
    return shutil.copytree(lite.vae.folder, tmp_path / "lite", ignore=shutil.ignore_patterns("sana_export.json"))


def pipeline_folder(folder: Path, tiny_checkpoint: SanaCheckpoint) -> Path:
    copied = shutil.copytree(tiny_checkpoint.folder, folder.parent / "pipeline")
    shutil.rmtree(copied / "vae")
    shutil.copytree(folder, copied / "vae")
    return copied


def sharded(folder: Path, _: SanaCheckpoint) -> Path:
    AutoencoderDC.from_pretrained(folder).save_pretrained(folder.parent / "shards", max_shard_size="1MB")
    assert len(list((folder.parent / "shards").glob("*.safetensors"))) > 1
    return folder.parent / "shards"


def of_a_variant(folder: Path, _: SanaCheckpoint) -> Path:
    AutoencoderDC.from_pretrained(folder).save_pretrained(folder.parent / "fp16", variant="fp16")
    return folder.parent / "fp16"


@pytest.mark.parametrize(
    "place",
    [
        lambda folder, tiny: folder,
        pipeline_folder,
        lambda folder, tiny: pipeline_folder(folder, tiny) / "vae",
        sharded,
        of_a_variant,
    ],
    ids=["bare", "pipeline", "its vae folder", "shards", "variant"],
)
def test_every_place_gives_the_same_network_to_the_export_and_to_the_reference(
    lite: SanaCheckpoint, folder: Path, tiny_checkpoint: SanaCheckpoint, place: Any
) -> None:
    found = replace(lite, vae=open_vae(str(place(folder, tiny_checkpoint)), "fp16", Hub()))
    weights, wanted = found.weights("vae"), lite.weights("vae")
    assert set(weights) == set(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    own, other = found.config("vae"), lite.config("vae")
    assert {key: own[key] for key in own if not key.startswith("_")} == {
        key: other[key] for key in other if not key.startswith("_")
    }
    state = load_reference(found, Options("fp32", False), pag=False).vae.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_a_variant_of_the_checkpoint_is_not_required_of_the_autoencoder(folder: Path, tiny_pipeline: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "fp16"
    tiny_pipeline.save_pretrained(checkpoint, variant="fp16")
    shutil.rmtree(checkpoint / "vae")  # and the checkpoint needs none of its own
    found = open_checkpoint(str(checkpoint), weights_variant="fp16", vae=str(folder))
    reference = load_reference(found, Options("fp32", False), pag=False)
    assert reference.vae.config.decoder_layers_per_block[0] == 0
    assert [path.name for path in found.weight_files("vae")] == ["diffusion_pytorch_model.safetensors"]


def test_if_there_are_only_files_of_a_variant_the_error_says_which(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ArtifactError, match=r"vae of .* has no weights") as caught:
        open_checkpoint("tiny-random", vae=str(folder))
    assert caught.value.fix == "--variant fp16"
    found = open_checkpoint("tiny-random", vae=str(folder), weights_variant="fp16")  # of which the checkpoint itself has no files
    reference = load_reference(found, Options("fp32", False), pag=False).vae
    assert torch.equal(reference.state_dict()["decoder.conv_in.weight"], found.weights("vae")["decoder.conv_in.weight"])


def test_it_is_recorded_and_makes_another_export(
    lite: SanaCheckpoint, folder: Path, tiny_checkpoint: SanaCheckpoint, tmp_path: Path
) -> None:
    found = open_checkpoint("tiny-random", vae=str(folder))
    record = found.record()
    assert record.vae is not None
    assert record.vae.path == str(folder)
    assert model_words(record) == ["tiny-random", "--vae", str(folder)]
    assert (found.sha256, record.vae.sha256) == (lite.sha256, lite.vae and lite.vae.sha256)  # the same content elsewhere
    manifest = replace(write_bundle(tmp_path / "bundle"), checkpoint=record)
    manifest.save(tmp_path / "bundle")
    assert Manifest.load(tmp_path / "bundle").checkpoint == record
    options = choose_options(found, "fp32", (), None)
    keys = {export_key(checkpoint, options, ["sampler"]) for checkpoint in (found, lite, tiny_checkpoint)}
    assert len(keys) == 2
    edit(folder / "config.json", scaling_factor=0.5)
    changed = open_checkpoint("tiny-random", vae=str(folder))
    assert changed.sha256 != found.sha256
    assert changed.record().vae != record.vae
    assert tiny_checkpoint.record().vae is None


def test_the_benchmark_runs_the_same_autoencoder(lite: SanaCheckpoint, tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "bundle")
    job = _job("eager", tmp_path, lite, manifest, load_workload("smoke"), None)
    opened = open_job(Job.from_json(json.loads(json.dumps(job.as_json()))))
    assert opened.sha256 == lite.sha256
    assert opened.config("vae") == lite.config("vae")


def test_a_checkpoint_that_has_it_already_needs_no_option(tmp_path: Path, lite: SanaCheckpoint) -> None:
    whole = open_checkpoint(str(make_checkpoint("tiny-random", tmp_path / "whole", vae="dc-ae-lite")))
    assert whole.vae is None
    weights, wanted = whole.weights("vae"), lite.weights("vae")
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert whole.synthetic


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_channels": 16}, ["latents of 16 channels", "wanted:", "32 channels and 32 pixels, as tiny-random has"]),
        (
            {key: value[1:] for key, value in AUTOENCODER_RECIPES["tiny-dc-ae-lite"].items() if isinstance(value, tuple)},
            ["32 channels, 16 image pixels per latent pixel", "as tiny-random has"],
        ),
    ],
)
def test_latents_that_do_not_fit_are_refused_with_both_names(folder: Path, changes: dict[str, Any], said: list[str]) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(ArtifactError) as caught:
        open_checkpoint("tiny-random", vae=str(folder))
    message = str(caught.value)
    assert f"the autoencoder {folder} does not fit the transformer of tiny-random" in message
    assert all(part in message for part in said), message


def test_a_decoder_that_is_not_supported_is_refused_when_it_is_opened(folder: Path, tmp_path: Path) -> None:
    changes = {"decoder_conv_act_fn": "gelu", "upsample_block_type": "bilinear"}
    edit(folder / "config.json", **changes)
    own = make_checkpoint("tiny-random", tmp_path / "own")
    edit(own / "vae" / "config.json", **changes)
    for opening in ({"model": "tiny-random", "vae": str(folder)}, {"model": str(own)}):
        with pytest.raises(ArtifactError) as caught:
            open_checkpoint(**opening)
        assert "unsupported decoder_conv_act_fn: found 'gelu'" in str(caught.value)
        assert "unsupported upsample_block_type: found 'bilinear'" in str(caught.value)
        assert "--vae dc-ae-lite" in str(caught.value.fix)


def test_a_config_without_the_keys_that_have_defaults_opens(folder: Path, lite: SanaCheckpoint) -> None:
    config = json.loads((folder / "config.json").read_text())
    left_out = ("decoder_act_fns", "decoder_norm_types", "upsample_block_type", "in_channels", "_class_name", "decoder_in_shortcut")
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in left_out}))
    found = open_checkpoint("tiny-random", vae=str(folder))
    assert set(found.weights("vae")) == set(lite.weights("vae"))


def test_other_things_are_refused_as_what_they_are(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(ArtifactError, match="is not an autoencoder of Sana") as caught:
        open_checkpoint("tiny-random", vae=str(folder))
    assert caught.value.found == "config.json of AutoencoderKL"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="has no autoencoder"):
        open_checkpoint("tiny-random", vae=str(tmp_path / "empty"))
    for name in ("", " ", "no-such-vae", str(tmp_path / "none")):
        with pytest.raises(UsageError, match="unknown autoencoder") as unknown:
            open_checkpoint("tiny-random", vae=name)
        assert "dc-ae-lite" in str(unknown.value)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        with pytest.raises(UsageError, match="is a file, not an autoencoder") as unknown:
            open_vae(str(folder / file), None, Hub())
        assert unknown.value.fix == f"--vae {folder}"


@pytest.mark.parametrize(
    ("written", "repo", "commit"),
    [
        ("https://huggingface.co/mit-han-lab/dc-ae-lite-f32c32-diffusers", "mit-han-lab/dc-ae-lite-f32c32-diffusers", None),
        ("https://hf.co/someone/vae/tree/v1", "someone/vae", "v1"),
        ("someone/vae@v1", "someone/vae", "v1"),
    ],
)
def test_the_address_of_an_autoencoder_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: str, repo: str, commit: str | None
) -> None:
    asked = []
    monkeypatch.setattr("sana_export.checkpoint.vae.fetch", lambda *words, first: asked.append(words[:2]) or folder)
    assert open_vae(written, None, Hub()).source == (repo if commit is None else f"{repo}@{commit}")
    assert asked == [(repo, commit)]


def test_a_part_of_a_repository_is_not_an_autoencoder() -> None:
    with pytest.raises(UsageError, match="is a part of a repository") as caught:
        open_vae("https://huggingface.co/someone/vae/blob/main/vae/config.json", None, Hub())
    assert caught.value.fix == "--vae someone/vae"


def test_an_autoencoder_may_be_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_vae(f"~/{folder.name}", None, Hub()).source == str(folder)


@pytest.mark.parametrize("damage", ['{"encoder_block_out_channels": null}', '{"encoder_block_out_channels": 3}', "{", "[]"])
def test_a_replaced_autoencoder_may_be_damaged(folder: Path, tiny_checkpoint: SanaCheckpoint, damage: str) -> None:
    own = pipeline_folder(folder, tiny_checkpoint)
    (own / "vae" / "config.json").write_text(damage)
    assert open_checkpoint(str(own), vae=str(folder)).config("vae")["decoder_conv_act_fn"] == "silu"


def test_the_tables_agree() -> None:
    assert {row.decoder for row in AUTOENCODERS.values()} == set(DECODERS)
    assert set(AUTOENCODERS) == set(AUTOENCODER_RECIPES)
    published = AUTOENCODER_RECIPES["dc-ae-lite"]
    assert published == {**RECIPES["sana-1600m-1024px"].vae, **LITE}
    assert published["decoder_layers_per_block"] == (0, 3, 5, 4, 4, 4)
    assert AUTOENCODER_RECIPES["mid-dc-ae-lite"]["decoder_layers_per_block"] == (0, 2, 2, 2, 1, 1)
    assert {row.repo for row in AUTOENCODERS.values() if row.repo} == {
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        "mit-han-lab/dc-ae-lite-f32c32-diffusers",
    }
