"""The training of the small Sana on a few steps, with drawn shapes in place of a font, and the rules of what is held out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_export.architectures import AUTOENCODER
from sana_export.synth.tokenizer import build_gemma_tokenizer, build_tokenizer
from tools.train_small import captions, concepts, evaluation, networks, scenes, train_autoencoder, train_transformer, training
from tools.train_small.prompts import PromptEncoder

NARROW_VAE = {
    **AUTOENCODER,
    "encoder_block_out_channels": (32,) * 6,
    "decoder_block_out_channels": (8, 16, 32, 32, 32, 32),
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1,) * 6,
}
NARROW_TEXT = {
    **networks.TEXT,
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
}
NARROW_TRANSFORMER = {
    **networks.TRANSFORMER,
    **{"num_attention_heads": 2, "num_layers": 2, "num_cross_attention_heads": 1, "cross_attention_dim": 64},
    "caption_channels": 32,
}


def shapes(glyph: str, side: int) -> np.ndarray:
    """A disc in a colour of the glyph's own, premultiplied [side, side, 4]."""
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    alpha = (x**2 + y**2 < 1).astype(np.float32)
    colour = np.array([(ord(glyph) >> shift & 15) / 15 for shift in (0, 4, 8)], dtype=np.float32)
    return np.dstack([alpha[..., None] * colour, alpha])


def options(folder: Path, **given: Any) -> argparse.Namespace:
    settings = {"steps": 4, "batch": 2, "rate": 1e-3, "pool": 6, "seed": 0, "device": "cpu", "decoder_only": False}
    return argparse.Namespace(folder=folder, **{**settings, **given})


def test_glyphs_lie_where_the_scene_says() -> None:
    scene = scenes.Scene("placed", (3,), 3, False, "left", ((3, 34, 64, 40),))
    picture = scenes.render(scene, shapes)
    assert picture[64, 100].tolist() == list(concepts.COLOURS[3][2])
    expected = np.rint(shapes(concepts.CONCEPTS[3].glyph, 40)[20, 20, :3] * 255)
    assert picture[64, 34].tolist() == expected.tolist()


def test_a_glyph_counts_for_more_than_its_background() -> None:
    placed = scenes.Scene("placed", (3,), 3, False, "left", ((3, 10, 64, 40),))
    whole = scenes.Scene("one", (3,), 3, False, "", ((3, 64, 64, 128),))
    weight = train_autoencoder.emphasis([placed, whole])
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(weight[1], torch.ones(1, 128, 128))
    inside = torch.zeros(128, 128, dtype=torch.bool)
    inside[44:84, :30] = True  # cut at the border
    assert len(weight[0, 0][inside].unique()) == len(weight[0, 0][~inside].unique()) == 1
    assert float(weight[0, 0, 64, 0] / weight[0, 0, 0, 0]) == pytest.approx(train_autoencoder.GLYPH_WEIGHT)
    wanted = torch.zeros(2, 3, 128, 128)
    off = [train_autoencoder.reconstruction_loss(wanted + 0.1 * place, wanted, weight) for place in (inside, ~inside)]
    assert off[0] / inside.sum() > 2 * off[1] / (~inside).sum()


def test_no_training_scene_or_caption_is_one_that_is_held_out() -> None:
    rng = np.random.default_rng(7)
    asked = {prompt.text for prompt in (*evaluation.grid_prompts(), *evaluation.meter_prompts())}
    kinds = set()
    for _ in range(4000):
        scene = scenes.draw_scene(rng)
        kinds.add(scene.kind)
        assert not scenes.held_out(scene.kind, scene.concepts, scene.detail)
        assert scene.colour not in [scenes.held_out_colour(concept) for concept in scene.concepts]
        assert captions.draw_caption(scene, rng) not in asked
    assert kinds == set(scenes.KINDS)


def test_the_prompts_that_judge_are_held_out_in_the_way_they_say() -> None:
    prompts = [*evaluation.grid_prompts(), *evaluation.meter_prompts()]
    assert len(evaluation.grid_prompts()) == 40
    assert len({prompt.text for prompt in evaluation.grid_prompts()}) == 40
    for prompt in prompts:
        scene = prompt.scene
        if prompt.why == "combination":
            assert scenes.held_out(scene.kind, scene.concepts, scene.detail)
        elif prompt.why == "colour":
            assert scene.colour == scenes.held_out_colour(scene.concepts[0])
            assert any(name in prompt.text for name in concepts.COLOURS[scene.colour][:2])
        else:
            lasts = [captions.templates(scene, language)[-1] for language in captions.LANGUAGES]
            assert prompt.text in [
                captions.fill(last, scene, captions.Choice(language, 0))
                for last, language in zip(lasts, captions.LANGUAGES, strict=True)
            ]
    languages = [any("\u4e00" <= character <= "\u9fff" for character in prompt.text) for prompt in evaluation.grid_prompts()]
    assert 10 <= sum(languages) <= 25


def test_prompts_are_encoded_as_the_pipeline_encodes_them() -> None:
    from diffusers import SanaPipeline
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    text_encoder = Gemma2Model(Gemma2Config(**{**NARROW_TEXT, "vocab_size": tokenizer.get_vocab_size()})).eval()
    prompts = ["a red apple", "一只可爱的熊猫", "A cute 🐼 eating 🎋 ", None]
    with torch.no_grad():
        rows, mask = PromptEncoder(tokenizer)(text_encoder, prompts)
        pipeline = SanaPipeline(build_gemma_tokenizer(), text_encoder, None, None, None)  # type: ignore[arg-type]
        chi = PromptEncoder(tokenizer).instruction.split("\n")
        wanted, attended, empty, empty_mask = pipeline.encode_prompt(
            [prompt for prompt in prompts if prompt], complex_human_instruction=chi, device=torch.device("cpu")
        )
    for index in range(3):
        assert mask[index].sum() == attended[index].sum()
        torch.testing.assert_close(rows[index][mask[index] > 0], wanted[index][attended[index] > 0], atol=2e-5, rtol=1e-4)
    assert mask[3].sum() == empty_mask[0].sum() == 1
    torch.testing.assert_close(rows[3, :1], empty[0, :1], atol=2e-5, rtol=1e-4)


def test_the_velocity_is_what_the_scheduler_takes_for_the_clean_latents() -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**networks.SCHEDULER)
    scheduler.set_timesteps(20)
    scheduler._init_step_index(scheduler.timesteps[4])
    clean, noise = torch.randn(2, 1, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    x, velocity = train_transformer.noised(clean, noise, scheduler.sigmas[4].view(1))
    torch.testing.assert_close(scheduler.convert_model_output(velocity, sample=x), clean)


def test_noise_levels_are_shifted_towards_noise() -> None:
    sigma = train_transformer.draw_sigma(20_000, torch.Generator().manual_seed(0))
    assert 0 < float(sigma.min()) < float(sigma.max()) < 1
    assert float(sigma.median()) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    whole = train_autoencoder.train(options(tmp_path / "a"), shapes, NARROW_VAE, compiled=False)

    class Interrupted(Exception):
        pass

    save = training.Training.save

    def save_and_stop(self: training.Training) -> None:
        save(self)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "save", save_and_stop)
        with pytest.raises(Interrupted):
            train_autoencoder.train(options(tmp_path / "b"), shapes, NARROW_VAE, compiled=False)
    assert torch.load(tmp_path / "b" / "autoencoder.pt", weights_only=True)["step"] == 2
    resumed = train_autoencoder.train(options(tmp_path / "b"), shapes, NARROW_VAE, compiled=False)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


@pytest.mark.slow
def test_both_trainings_lower_their_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 10)
    monkeypatch.setattr(training, "WARM_UP", 5)
    autoencoder = train_autoencoder.train(options(tmp_path, steps=60, batch=6), shapes, NARROW_VAE, compiled=False)
    first = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    made = options(tmp_path, steps=60, batch=16, rate=3e-3)
    trained, factor = train_transformer.train(made, shapes, autoencoder.eval(), NARROW_TEXT, NARROW_TRANSFORMER)
    second = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert first[-1] < 0.8 * first[0]
    assert second[-1] < 0.8 * second[0]
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)["latents"] * factor
    assert float(latents.std()) == pytest.approx(1, abs=1e-3)
    assert set(trained) == {"text_encoder", "transformer"}
