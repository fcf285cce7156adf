"""What a user may give as MODEL. Anything else gets an error that names the thing and the command that takes it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.checkpoint.model_names import from_url
from sana_export.cli.main import main
from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.formats.safetensors_header import TensorEntry
from sana_export.variants import VARIANTS, find_variant
from tests.support.checkpoint_edits import linked_copy


def refusal(model: object, kind: type[SanaExportError] = UsageError, **options: Any) -> SanaExportError:
    with pytest.raises(kind) as caught:
        open_checkpoint(str(model), **options)
    assert None not in (caught.value.found, caught.value.wanted, caught.value.fix)
    return caught.value


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(name).message == "MODEL is empty"
    assert find_variant(name) is None
    assert main(["export", name, "-o", "bundle"]) == 2
    Path("recipe.toml").write_text(f'model = "{name}"\noutput = "bundle"\n')
    assert main(["engines", "recipe.toml"]) == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.toml"}


@pytest.mark.parametrize("option", ["revision", "weights_variant"])
def test_an_empty_option_is_refused(option: str) -> None:
    error = refusal("tiny-random", **{option: ""})
    assert error.message == f"--{option.removeprefix('weights_')} is empty"


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("https://huggingface.co/Org/Name", ("Org/Name", None)),
        ("https://huggingface.co/Org/Name/", ("Org/Name", None)),
        ("http://www.huggingface.co/Org/Name?library=diffusers", ("Org/Name", None)),
        ("huggingface.co/Org/Name", ("Org/Name", None)),
        ("https://hf.co/Org/Name/tree/main", ("Org/Name", "main")),
        ("https://huggingface.co/Org/Name/tree/refs%2Fpr%2F1", ("Org/Name", "refs/pr/1")),
        ("Org/Name", ("Org/Name", None)),
        ("tiny", ("tiny", None)),
        ("./https:", ("./https:", None)),
    ],
)
def test_the_address_of_a_repository_names_it(model: str, wanted: tuple[str, str | None]) -> None:
    assert from_url(model, None) == wanted
    if wanted[1] is None:
        assert from_url(model, "v1") == (wanted[0], "v1")
    else:
        assert from_url(model, wanted[1]) == wanted
        with pytest.raises(UsageError, match="name two revisions"):
            from_url(model, "v1")


def test_the_address_of_a_published_checkpoint_is_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repo: str, revision: str | None, *others: object, **checks: object) -> Path:
        asked.append((repo, revision))
        raise KeyboardInterrupt

    monkeypatch.setattr("sana_export.checkpoint.checkpoint.fetch", fetch)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint("https://huggingface.co/Efficient-Large-Model/Sana_600M_512px_diffusers/tree/main")
    assert asked == [("Efficient-Large-Model/Sana_600M_512px_diffusers", "main")]


@pytest.mark.parametrize(
    ("model", "found", "fix"),
    [
        ("https://civitai.com/models/1/sana", "an address at civitai.com", "give its folder"),
        ("https://huggingface.co/datasets/Org/Name", "an address at huggingface.co", "give its folder"),
        ("https://[hub/Org/Name", "an address at no host", "give its folder"),
        ("https://huggingface.co/Org/Name/tree/main/vae", "tree/main/vae", "sana-export export Org/Name -o Name-bundle"),
        (
            "https://huggingface.co/Org/Name/blob/main/x.safetensors",
            "blob/main/x.safetensors",
            "sana-export export Org/Name -o Name-bundle",
        ),
    ],
)
def test_another_address_is_refused(model: str, found: str, fix: str) -> None:
    error = refusal(model)
    assert error.found == found
    assert fix in str(error.fix)


def test_a_bundle_is_not_a_checkpoint(tiny_bundle: Path) -> None:
    error = refusal(tiny_bundle, ArtifactError)
    assert error.message == f"{tiny_bundle} is a bundle, not a checkpoint"
    assert str(error.fix).startswith(f"sana-export export tiny-random -o {shlex.quote(str(tiny_bundle))} --dtype fp32")


def test_a_transformers_file_names_the_base_checkpoint(tiny_checkpoint: Any, tmp_path: Path) -> None:
    (file,) = tiny_checkpoint.weight_files("transformer")
    error = refusal(file)
    assert error.message == f"{file} is a file, not a checkpoint"
    assert error.found == "the weights of a transformer only"
    command = shlex.split(str(error.fix))
    assert command[:5] == ["sana-export", "export", "tiny-random", "--transformer", str(file)]
    assert open_checkpoint(command[2], transformer=Path(command[4])).sha256 == tiny_checkpoint.sha256


@pytest.mark.parametrize("alias", ["sana-600m-512px", "sana-1600m-1024px", "sana1-5-4-8b-1024px", "sana-sprint-0-6b-1024px"])
def test_the_shapes_of_a_file_find_a_published_base(alias: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sana_export.checkpoint import model_names
    from sana_export.checkpoint.configs import expected_shapes
    from sana_export.checkpoint.weights import Stored, Weights

    row, file = VARIANTS[alias], tmp_path / "fine-tune.safetensors"
    file.touch()
    shapes = expected_shapes("transformer", row.transformer)
    weights = Weights({name: Stored(file, name, TensorEntry("BF16", shape, 0, 0)) for name, shape in shapes.items()})
    assert {found.architecture for found in model_names.fitting(weights)} == {row.architecture}
    monkeypatch.setattr(model_names, "open_single_file", lambda path: weights)
    base = shlex.split(str(refusal(file).fix))[2]
    assert VARIANTS[base].architecture == row.architecture


def test_other_files_are_called_what_they_are(tmp_path: Path) -> None:
    save_file({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 1)}, tmp_path / "style.safetensors")
    save_file({"model.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    cases = {
        "style.safetensors": ("a LoRA", f"export MODEL --lora {tmp_path / 'style.safetensors'} -o style-bundle"),
        "other.safetensors": ("which are not those of a published transformer", "sana-export variants"),
        "x.gguf": ("GGUF", "sana-export variants"),
        "x.ckpt": ("can run code", "sana-export variants"),
        "Sana_1600M_1024px.pth": ("can run code", "sana-export export sana-1600m-1024px -o sana-1600m-1024px-bundle"),
        "broken.safetensors": ("an empty file", "download the file again"),
        "notes": ("an empty file", "sana-export variants"),
    }
    for name, (found, fix) in cases.items():
        (tmp_path / name).touch()
        error = refusal(tmp_path / name)
        assert error.message == f"{tmp_path / name} is a file, not a checkpoint"
        assert found in str(error.found), name
        assert fix in str(error.fix), name


def test_a_part_of_a_checkpoint_names_the_whole(tiny_checkpoint: Any, tmp_path: Path) -> None:
    whole = linked_copy(tiny_checkpoint.folder, tmp_path / "whole")
    error = refusal(whole / "transformer", ArtifactError)
    assert "a config.json of SanaTransformer2DModel" in str(error.found)
    assert error.fix == f"sana-export export {whole} -o {whole}-bundle"
    assert "a config.json of gemma2" in str(refusal(whole / "text_encoder", ArtifactError).found)
    (tmp_path / "part").mkdir()
    moved = (whole / "transformer").rename(tmp_path / "part" / "transformer")
    file = moved / "diffusion_pytorch_model.safetensors"
    assert f"export tiny-random --transformer {file} -o" in str(refusal(moved, ArtifactError).fix)


def test_the_hubs_cache_names_the_snapshot(tiny_checkpoint: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Org--Name" / "snapshots" / "0123"
    linked_copy(tiny_checkpoint.folder, snapshot)
    assert f"sana-export export {snapshot} -o" in str(refusal(snapshot.parents[1], ArtifactError).fix)


def test_a_config_that_is_a_folder_or_too_deep(tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = linked_copy(tiny_checkpoint.folder, tmp_path / "checkpoint")
    config = folder / "vae" / "config.json"
    for make in (lambda: config.write_text("[" * 100_000), lambda: config.write_text(json.dumps([1])), config.mkdir):
        config.unlink(missing_ok=True)
        make()
        with pytest.raises(ArtifactError, match=r"vae.config.json is (damaged|not a config in JSON)"):
            open_checkpoint(str(folder))
