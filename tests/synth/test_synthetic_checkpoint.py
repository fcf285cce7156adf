"""Synthetic checkpoints: they are reproducible, written whole or not at all, loadable, and every parameter has an effect."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPAGPipeline, SanaPipeline

from sana_export.errors import DependencyError, UsageError
from sana_export.progress import Progress
from sana_export.synth import checkpoint
from sana_export.synth.checkpoint import MARKER, build_pipeline, make_checkpoint
from sana_export.synth.recipes import RECIPES
from sana_export.synth.shards import StoredWeights

TINY = RECIPES["tiny-random"]
COMPONENTS = ("text_encoder", "transformer", "vae")
PROMPT = "a cute 🐼 eating 🎋, ink drawing style"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny-random", tmp_path_factory.mktemp("made") / "tiny-random")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return quiet(SanaPipeline.from_pretrained(folder))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, prompt: str = PROMPT, *, seed: int = 0, steps: int = 8, size: int = 256, **options: Any) -> Any:
    return pipeline(
        prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        use_resolution_binning=False,
        **{"output_type": "np", **options},
    ).images


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(1 / max(np.mean((one - other) ** 2), 1e-20)))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_for_any_global_state(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = make_checkpoint("tiny-random", tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert digests(again) == digests(folder)
    other = digests(make_checkpoint("tiny-random", tmp_path / "other", seed=1))
    assert {name for name, digest in digests(folder).items() if other[name] != digest} == {
        MARKER,
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_folder_is_small_and_marked_as_synthetic(folder: Path, pipeline: Any) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8e6
    assert json.loads((folder / MARKER).read_text()) == {
        "synthetic": True,
        "variant": "tiny-random",
        "dtype": "float32",
        "seed": 0,
    }
    assert pipeline.text_encoder.config.vocab_size == len(pipeline.tokenizer)
    assert pipeline.text_encoder.config._attn_implementation == "eager"
    assert pipeline.scheduler.config.flow_shift == 3.0
    pipeline.scheduler.set_timesteps(20)
    expected = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert pipeline.scheduler.timesteps.tolist() == [int(t) for t in expected.split()]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny-random", {"text_encoder": 0.38, "transformer": 0.97, "vae": 0.58}),
        ("mid", {"text_encoder": 20.6, "transformer": 60.1, "vae": 21.2}),
    ],
)
def test_recipes_have_the_documented_sizes(pipeline: Any, name: str, millions: dict[str, float]) -> None:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    recipe = RECIPES[name]
    with torch.device("meta"):
        models = {
            "text_encoder": Gemma2Model(Gemma2Config(vocab_size=len(pipeline.tokenizer), **recipe.text_encoder)),
            "transformer": SanaTransformer2DModel(**recipe.transformer),
            "vae": AutoencoderDC(**recipe.vae),
        }
    counts = {component: sum(p.numel() for p in model.parameters()) / 1e6 for component, model in models.items()}
    assert counts == pytest.approx(millions, rel=0.02)


def test_no_parameter_has_a_neutral_value(pipeline: Any) -> None:
    for component in COMPONENTS:
        for name, parameter in getattr(pipeline, component).named_parameters():
            assert parameter.isfinite().all(), name
            assert parameter.std() > 1e-3, name


def test_every_parameter_changes_the_result(pipeline: Any) -> None:
    """The relative slope of the output for each parameter: its change if the parameter is multiplied by 1 + h."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.tensor([pipeline.tokenizer.encode(PROMPT)])
    text = pipeline.text_encoder(ids)[0]
    context, mask = random(1, 9, 64), torch.ones(1, 9)
    velocity = pipeline.transformer(random(1, 32, 6, 8), context, torch.tensor([700]), encoder_attention_mask=mask)
    image = pipeline.vae.decode(2 * random(1, 32, 6, 7)).sample
    outputs = {"text_encoder": text, "transformer": velocity.sample, "vae": image}
    for component, output in outputs.items():
        named = [p for p in getattr(pipeline, component).named_parameters() if not p[0].startswith("encoder.")]
        weights = [parameter for _, parameter in named]
        slopes = torch.autograd.grad((output * random(*output.shape)).sum(), weights, allow_unused=True)
        for (name, weight), slope in zip(named, slopes, strict=True):
            assert slope is not None, f"{component}.{name} is not used"
            if name.endswith("attn2.to_k.bias"):
                continue  # It adds the same number to all scores of a query, which softmax cancels.
            assert (slope * weight).norm() > 1e-3 * output.norm(), f"{component}.{name} hardly matters"


def test_sampling_stays_bounded_and_the_image_spreads_over_the_range(pipeline: Any) -> None:
    latents: list[float] = []
    decoded: list[torch.Tensor] = []
    hook = pipeline.vae.decoder.register_forward_hook(lambda _module, _inputs, output: decoded.append(output))

    def watch(_pipeline: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents.append(state["latents"].std().item())
        return {}

    try:
        sample(pipeline, steps=20, callback_on_step_end=watch)
    finally:
        hook.remove()
    assert len(latents) == 20
    assert min(latents) > 0.5
    assert max(latents) < 3
    spread = decoded[0].std(dim=(0, 2, 3))
    assert ((spread > 0.2) & (spread < 0.65)).all(), spread
    assert (decoded[0].abs() > 1).float().mean() < 0.15


def test_prompt_guidance_seed_and_perturbed_attention_all_matter(folder: Path, pipeline: Any) -> None:
    image = sample(pipeline)
    assert psnr(image, sample(pipeline, "一辆红色的汽车")) < 20
    assert psnr(image, sample(pipeline, PROMPT + ".")) < 40
    assert psnr(image, sample(pipeline, guidance_scale=1.0)) < 20
    assert psnr(image, sample(pipeline, negative_prompt="blurry")) < 25
    assert psnr(image, sample(pipeline, seed=1)) < 25
    perturbed = quiet(SanaPAGPipeline.from_pretrained(folder, pag_applied_layers="transformer_blocks.1"))
    assert psnr(image, sample(perturbed, pag_scale=0.0)) > 80
    assert psnr(image, sample(perturbed, pag_scale=2.0)) < 32


def test_half_precision_computes_the_same_image(folder: Path, pipeline: Any) -> None:
    """The recipe stays within the range of fp16, so differences are rounding."""
    half = quiet(SanaPipeline.from_pretrained(folder, dtype=torch.float16))
    assert psnr(sample(pipeline), sample(half)) > 45


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "rms_norm_across_heads"},
        {"interpolation_scale": 1.0, "sample_size": 64},
        {
            "num_attention_heads": 6,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 48,
            "cross_attention_dim": 192,
        },
        {"num_layers": 12},
        {"guidance_embeds": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_variations_of_a_recipe_keep_their_scale(pipeline: Any, changes: dict[str, Any]) -> None:
    recipe = replace(TINY, transformer={**TINY.transformer, **changes})
    variation = build_pipeline(recipe)
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn((2, 32, 6, 10), generator=generator)
    context = torch.randn((2, 9, 64), generator=generator)
    guidance = torch.tensor([0.45, 0.45]) if "guidance_embeds" in changes else None
    stream: list[torch.Tensor] = []
    variation.transformer.transformer_blocks[-1].register_forward_hook(lambda _module, _inputs, output: stream.append(output))
    with torch.no_grad():
        velocity = variation.transformer(latents, context, torch.tensor([900, 300]), guidance=guidance).sample
    assert 1 < stream[0].std() < 2.5
    assert 0.5 < velocity.std() < 3
    # The share of the latents in the velocity, which makes sampling forget its noise.
    share = (velocity * latents).sum() / latents.pow(2).sum()
    assert 0.3 < share < 1.2
    # Parameters that the change does not affect stay the same.
    ours, theirs = variation.transformer.state_dict(), pipeline.transformer.state_dict()
    same = [name for name in ours if name in theirs and torch.equal(ours[name], theirs[name])]
    if "num_attention_heads" not in changes:
        assert "transformer_blocks.0.attn1.to_q.weight" in same
    assert all(map(torch.equal, variation.vae.state_dict().values(), pipeline.vae.state_dict().values()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_stored_in_the_dtype_and_under_the_variant(tmp_path: Path, pipeline: Any, dtype: str) -> None:
    from safetensors import safe_open

    made = make_checkpoint("tiny-random", tmp_path / "half", dtype=dtype, variant="fp16")
    files = sorted(made.rglob("*.safetensors"))
    assert [file.name for file in files] == [
        "model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    ]
    for file in files:
        with safe_open(file, "pt") as stored:
            assert {stored.get_tensor(name).dtype for name in stored.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    loaded = SanaPipeline.from_pretrained(made, variant="fp16", dtype=torch.float32)
    for component in COMPONENTS:
        full = getattr(pipeline, component).state_dict()
        for name, weight in getattr(loaded, component).state_dict().items():
            assert torch.equal(weight, full[name].to(getattr(torch, dtype)).float()), name


def test_an_interrupted_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_checkpoint("tiny-random", tmp_path / "checkpoints" / "tiny-random")
    old = digests(target)
    write = StoredWeights.write
    calls = 0

    def interrupted(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        write(self, *args)

    for name in ("tiny-random", "new"):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(StoredWeights, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make_checkpoint("tiny-random", target.with_name(name), seed=5)
        assert [path.name for path in target.parent.iterdir()] == ["tiny-random"]
    assert digests(target) == old
    make_checkpoint("tiny-random", target, seed=5)
    assert json.loads((target / MARKER).read_text())["seed"] == 5
    assert [path.name for path in target.parent.iterdir()] == ["tiny-random"]


def test_progress_counts_the_networks_and_how_much_of_each_is_written(tmp_path: Path) -> None:
    reports: list[Progress] = []
    make_checkpoint("tiny-random", tmp_path / "made", on_progress=reports.append)
    *writing, last = reports
    assert last == Progress("done", 3, 3)
    assert list(dict.fromkeys(report.doing for report in writing)) == [f"writing {name}" for name in COMPONENTS]
    assert all(report.doing == f"writing {COMPONENTS[int(report.done)]}" and report.total == 3 for report in writing)
    assert all(before.done < after.done for before, after in pairwise(writing))


def test_wrong_requests_say_what_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tiny-random"):
        make_checkpoint("tinny", tmp_path / "a")
    with pytest.raises(UsageError, match="bfloat16"):
        make_checkpoint("tiny-random", tmp_path / "a", dtype="int8")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a synthetic checkpoint"):
        make_checkpoint("tiny-random", foreign)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    with pytest.raises(DependencyError, match="could not be written"):
        make_checkpoint("tiny-random", foreign / "thesis.txt" / "inside")

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Path, "write_text", full)
    with pytest.raises(DependencyError, match="No space left"):
        make_checkpoint("tiny-random", tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]
