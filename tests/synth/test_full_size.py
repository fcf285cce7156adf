"""Synthetic checkpoints of the published configs: file format, bounded memory, scale of activations, and errors."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, SanaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma2Model

from sana_export import files as disk
from sana_export.errors import DependencyError, UsageError
from sana_export.synth.checkpoint import MARKER, build_pipeline, find_recipe, make_checkpoint
from sana_export.synth.recipes import RECIPES, SyntheticRecipe
from sana_export.synth.shards import StoredWeights
from sana_export.synth.weights import BLOCK, PIECE, RandomWeights
from sana_export.variants import VARIANTS

SHARD_SIZE = 400_000
LOADERS = {"transformer": SanaTransformer2DModel, "vae": AutoencoderDC, "text_encoder": Gemma2Model}


def narrow(alias: str) -> SyntheticRecipe:
    """A published recipe with the widths of `tiny-random` and its own depth, norms, schedule and pipeline."""
    recipe, tiny = RECIPES[alias], RECIPES["tiny-random"]
    widths = (
        "num_attention_heads",
        "num_cross_attention_heads",
        "cross_attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
    )
    text = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar")
    channels = ("encoder_block_out_channels", "decoder_block_out_channels")
    return replace(
        recipe,
        transformer={**recipe.transformer, **{key: tiny.transformer[key] for key in widths}},
        vae={**recipe.vae, **{key: tiny.vae[key] for key in channels}},
        text_encoder={**recipe.text_encoder, **{key: tiny.text_encoder[key] for key in text}, "vocab_size": 4000},
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SANA-Sprint 0.6B at the widths of `tiny-random`, in many files."""
    folder = tmp_path_factory.mktemp("made") / "sprint"
    return make_checkpoint(narrow("sana-sprint-0-6b-1024px"), folder, dtype="bfloat16", seed=7, shard_size=SHARD_SIZE)


def test_recipes_have_the_published_configs() -> None:
    assert list(RECIPES) == [alias for alias, variant in VARIANTS.items() if not variant.embedded]
    for alias, recipe in RECIPES.items():
        sprint = "sprint" in alias
        assert recipe.pipeline == ("SanaSprintPipeline" if sprint else "SanaPipeline")
        assert recipe.transformer == VARIANTS[alias].transformer
        if VARIANTS[alias].repo:
            assert recipe.vae["decoder_block_out_channels"] == (128, 256, 512, 512, 1024, 1024)
            assert (recipe.text_encoder["vocab_size"], recipe.text_encoder["num_hidden_layers"]) == (256_000, 26)
    assert find_recipe("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers") is RECIPES["sana1-5-4-8b-1024px"]


@pytest.mark.parametrize("component", LOADERS)
def test_diffusers_and_transformers_load_the_shards_with_the_weights_of_the_seed(sharded: Path, component: str) -> None:
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    index = json.loads((sharded / component / f"{stem}.safetensors.index.json").read_text())
    files = sorted((sharded / component).glob("*.safetensors"))
    assert [file.name for file in files] == [f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    loaded, report = LOADERS[component].from_pretrained(sharded / component, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = getattr(build_pipeline(narrow("sana-sprint-0-6b-1024px"), 7), component).state_dict()
    found = loaded.state_dict()
    assert list(found) == list(expected)
    for name, value in found.items():
        assert torch.equal(value.float(), expected[name].bfloat16().float()), name
    assert index["metadata"]["total_size"] == sum(value.numel() * 2 for value in expected.values())
    for file in files:
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
            sizes = [stored.get_tensor(name).nbytes for name in names]
        assert names == {name for name, place in index["weight_map"].items() if place == file.name}
        assert sum(sizes) <= SHARD_SIZE or len(sizes) == 1


def test_the_folder_is_a_sprint_pipeline_that_samples(sharded: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sharded)
    assert type(pipeline).__name__ == "SanaSprintPipeline"
    assert type(pipeline.scheduler).__name__ == "SCMScheduler"
    marker = json.loads((sharded / MARKER).read_text())
    assert marker == {"synthetic": True, "variant": "sana-sprint-0-6b-1024px", "dtype": "bfloat16", "seed": 7}
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"height": 128, "width": 128, "use_resolution_binning": False, "output_type": "pt"}
    image = pipeline("a cat", **options, generator=torch.Generator().manual_seed(1)).images
    assert 0.05 < image.std() < 0.4


def test_the_same_seed_gives_the_same_bytes(sharded: Path, tmp_path: Path) -> None:
    recipe = narrow("sana-sprint-0-6b-1024px")
    names = [path.relative_to(sharded) for path in sorted(sharded.rglob("*")) if path.is_file()]
    again = make_checkpoint(recipe, tmp_path / "again", dtype="bfloat16", seed=7, shard_size=SHARD_SIZE)
    assert [name for name in names if (again / name).read_bytes() != (sharded / name).read_bytes()] == []
    other = make_checkpoint(recipe, tmp_path / "other", dtype="bfloat16", seed=8, shard_size=SHARD_SIZE)
    changed = {str(name) for name in names if (other / name).read_bytes() != (sharded / name).read_bytes()}
    assert changed == {MARKER, *(str(name) for name in names if name.suffix == ".safetensors")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_equals_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) for name, shape in {"b": (3, 5), "a.c": (7,), "a": (2, 1, 3, 3)}.items()
    }

    def pieces(name: str) -> list[torch.Tensor]:
        flat = tensors[name].flatten()
        return [flat[:4], flat[4:]]

    written: list[int] = []
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    weights = StoredWeights("model", shapes, pieces, dtype)
    weights.write(tmp_path, 10**9, "fp16", written.append)
    save_file({name: value.to(dtype) for name, value in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.fp16.safetensors", "theirs"]
    assert (tmp_path / "model.fp16.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(written) == weights.size == (15 + 7 + 18) * dtype.itemsize


@pytest.mark.parametrize("extra", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE, PIECE + 5])
def test_pieces_equal_one_draw(extra: int) -> None:
    count = PIECE + extra
    seed = int.from_bytes(hashlib.sha256(b"3/text_encoder/layers.0.mlp.up_proj.weight").digest()[:7], "little")
    whole = torch.randn(count, generator=torch.Generator().manual_seed(seed)) / count**0.5
    name = "layers.0.mlp.up_proj.weight"
    pieces = list(RandomWeights("text_encoder", {name: (1, count)}, 3).pieces(name))
    assert max(map(len, pieces)) < PIECE + BLOCK
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_for_any_tensor(tmp_path: Path) -> None:
    """A tensor of 307 MB (614 MB in float32), written in a new process after a small checkpoint."""
    program = f"""
from dataclasses import replace
from pathlib import Path
from sana_export.synth.checkpoint import make_checkpoint
from sana_export.synth.recipes import RECIPES

def memory(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

tiny = RECIPES["tiny-random"]
wide = replace(tiny, text_encoder={{**tiny.text_encoder, "vocab_size": 2_400_000}})
make_checkpoint(tiny, Path({str(tmp_path)!r}, "tiny-random"), dtype="float16")
before = memory("VmRSS")
folder = make_checkpoint(wide, Path({str(tmp_path)!r}, "wide"), dtype="float16")
print(before, memory("VmHWM"), sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    before, peak, size = map(int, ran.stdout.split())
    assert size > 300e6
    assert peak - before < 150e6


@pytest.mark.parametrize("alias", ["sana1-5-4-8b-1024px", "sana-1600m-4kpx-bf16"])
def test_activations_keep_their_scale_at_the_published_depth(alias: str) -> None:
    """60 and 20 transformer blocks, 26 layers of Gemma-2 and the whole autoencoder, at the widths of `tiny-random`."""
    pipeline = build_pipeline(narrow(alias))
    generator = torch.Generator().manual_seed(4)
    largest: dict[str, float] = {}

    def watch(component: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if isinstance(values, torch.Tensor) and values.is_floating_point():
                largest[component] = max(largest.get(component, 0.0), values.abs().max().item())

        return hook

    for component in LOADERS:
        for module in getattr(pipeline, component).modules():
            module.register_forward_hook(watch(component))
    stream: list[torch.Tensor] = []
    pipeline.transformer.transformer_blocks[-1].register_forward_hook(lambda _module, _inputs, output: stream.append(output))
    latents = torch.randn((1, 32, 6, 10), generator=generator)
    with torch.no_grad():
        text = pipeline.text_encoder(torch.randint(0, 3000, (1, 20), generator=generator))[0]
        velocity = pipeline.transformer(latents, text, torch.tensor([700])).sample
        image = pipeline.vae.decode(2 * latents[..., :4]).sample
    assert 0.7 < text.std() < 1.5
    assert 1 < stream[0].std() < 2.5
    assert 0.5 < velocity.std() < 3
    assert 0.15 < image.std() < 0.8
    # Far from 65504, and no NaN, which would not compare.
    assert all(value < 500 for value in largest.values()), largest


def test_too_little_disk_is_reported_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**9)
    monkeypatch.setattr(StoredWeights, "write", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(DependencyError) as caught:
        make_checkpoint("sana-600m-512px", tmp_path / "600m", dtype="float16")
    wanted = int(str(caught.value.wanted).split()[0])
    # 591.75 M + 2614.34 M + 312.25 M parameters of two bytes
    assert wanted == pytest.approx(7.037e9, rel=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_variant_names_similar_ones() -> None:
    with pytest.raises(UsageError, match="sana-600m-1024px") as caught:
        find_recipe("sana-600m-1024")
    assert caught.value.fix == "sana-export variants"
    with pytest.raises(UsageError, match="no such variant"):
        find_recipe("stabilityai/stable-diffusion-xl-base-1.0")
