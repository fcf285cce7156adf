"""`sana-export synth`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from sana_export import files as disk
from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.synth.shards import StoredWeights
from tests.support.command_line import Cli


def stored_dtypes(folder: Path) -> set[str]:
    found = set()
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= {str(stored.get_slice(name).get_dtype()) for name in stored.keys()}  # noqa: SIM118
    return found


def test_it_writes_a_checkpoint_that_opens_as_synthetic(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "tiny-random"
    ran = cli("synth", "tiny-random", "-o", folder, "--dtype", "bf16", "--seed", 3, "--shard-size", "500KB", "--json")
    assert ran.code == 0, ran.err
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    files = sum(file.is_file() for file in folder.rglob("*"))
    facts = {"variant": "tiny-random", "synthetic": True, "dtype": "bf16", "seed": 3, "files": files, "bytes": size}
    assert ran.json == {"checkpoint": str(folder), **facts}
    assert stored_dtypes(folder) == {"BF16"}
    marker = json.loads((folder / "sana_export.json").read_text())
    assert marker == {"synthetic": True, "variant": "tiny-random", "dtype": "bfloat16", "seed": 3}
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.synthetic
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert checkpoint.weights("transformer")["patch_embed.proj.weight"].shape == (128, 32, 1, 1)


def test_hot_weights_have_their_own_values_and_say_so(cli: Cli, tmp_path: Path) -> None:
    ran = {
        kind: cli("synth", "tiny-random", "-o", tmp_path / kind, *([f"--{kind}"] if kind == "hot" else []))
        for kind in ("hot", "normal")
    }
    assert [run.code for run in ran.values()] == [0, 0]
    assert "synthetic: hot random weights of seed 0" in ran["hot"].out
    assert "hot" not in ran["normal"].out.replace(str(tmp_path), "")
    name = "transformer_blocks.0.attn1.to_v.weight"
    weights = {kind: open_checkpoint(str(tmp_path / kind)).weights("transformer")[name] for kind in ran}
    rows = {kind: weight.float().norm(dim=1) for kind, weight in weights.items()}
    assert rows["hot"].max() > 5 * rows["normal"].max()


@pytest.mark.parametrize(("alias", "dtype"), [("tiny-random", "F32"), ("tiny-sprint", "F32")])
def test_the_small_checkpoints_have_the_dtype_of_their_aliases(cli: Cli, tmp_path: Path, alias: str, dtype: str) -> None:
    ran = cli("synth", alias, "-o", tmp_path / alias)
    assert ran.code == 0, ran.err
    assert "synthetic" in ran.out
    assert f"next: sana-export export {tmp_path / alias} -o {tmp_path / alias}-bundle\n" in ran.out
    assert stored_dtypes(tmp_path / alias) == {dtype}
    assert "[2/3] writing transformer" in ran.err


@pytest.mark.parametrize(
    ("alias", "gigabytes"),
    [
        ("sana-600m-1024px", 7.04),
        ("sana-1600m-1024px-bf16", 9.06),
        ("sana1-5-4-8b-1024px", 15.3),
        ("sana-sprint-1-6b-1024px", 9.07),
    ],
)
def test_too_little_disk_space_is_reported_with_the_bytes_wanted(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alias: str, gigabytes: float
) -> None:
    """The sizes are those of half precision, so they also show the default dtype."""
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**9)
    monkeypatch.setattr(StoredWeights, "write", lambda *_: pytest.fail("writing was started"))
    ran = cli("synth", alias, "-o", tmp_path / "out", "--json")
    assert ran.code == 3
    error = ran.json["error"]
    assert error["found"].startswith("1000000000 bytes")
    assert int(error["wanted"].split()[0]) == pytest.approx(gigabytes * 1e9, rel=2e-3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sana-600m-1024"], "sana-600m-1024px"),
        (["tiny-random", "--dtype", "int8"], "fp16"),
        (["tiny-random", "--seed", "-1"], "seed"),
        (["tiny-random", "--shard-size", "2XB"], "not a size"),
        (["tiny-random", "--shard-size", "0"], "not a size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_requests_are_refused(cli: Cli, tmp_path: Path, arguments: list[str], said: str) -> None:
    ran = cli("synth", *arguments, "-o", tmp_path / "out")
    assert ran.code == 2
    assert said in ran.err
    assert "fix:" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_changed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    ran = cli("synth", "tiny-random", "-o", tmp_path)
    assert ran.code == 2
    assert "not a synthetic checkpoint" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_it_writes_autoencoders_and_checkpoints_that_have_them(cli: Cli, tmp_path: Path) -> None:
    alone, whole = tmp_path / "lite", tmp_path / "tiny"
    ran = cli("synth", "tiny-dc-ae-lite", "-o", alone, "--seed", 5)
    assert ran.code == 0, ran.err
    assert f"next: sana-export export MODEL --vae {alone} -o BUNDLE" in ran.out
    assert {path.name for path in alone.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors", "sana_export.json"}
    ran = cli("synth", "tiny-random", "--vae", "dc-ae-lite", "--seed", 5, "-o", whole, "--json")
    assert (ran.code, ran.json["vae"]) == (0, "dc-ae-lite")
    assert (whole / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        alone / "diffusion_pytorch_model.safetensors"
    ).read_bytes()
    assert json.loads((whole / "vae" / "config.json").read_text())["decoder_layers_per_block"] == [0, 1, 1, 1, 1, 1]
    assert open_checkpoint(str(whole), vae=str(alone)).sha256 == open_checkpoint(str(whole)).sha256
    ran = cli("synth", "tiny-dc-ae", "--vae", "dc-ae-lite", "-o", tmp_path / "both")
    assert (ran.code, (tmp_path / "both").exists()) == (2, False)
    assert "tiny-dc-ae is an autoencoder itself" in ran.err


def test_an_autoencoder_that_does_not_fit_is_refused_before_anything_is_written(cli: Cli, tmp_path: Path) -> None:
    cli("synth", "tiny-dc-ae-lite", "-o", tmp_path / "lite")
    config = tmp_path / "lite" / "config.json"
    config.write_text(config.read_text().replace('"latent_channels": 32', '"latent_channels": 16'))
    for vae, code in ((tmp_path / "lite", 4), ("no-such-vae", 2), ("", 2)):
        ran = cli("export", "tiny-random", "--vae", vae, "-o", tmp_path / "bundle")
        assert ran.code == code, ran.err
        assert "fix:" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["lite"]
