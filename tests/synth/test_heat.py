"""Hot checkpoints: heavy tails, the same outlier channels in writers and readers, and images like those of normal weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_export.export.half import WideProducts
from sana_export.synth import heat, weights
from sana_export.synth.checkpoint import MARKER, build_pipeline, make_checkpoint, shapes_of
from sana_export.synth.heat import FACTORS, RULES, TAIL, Heat, heavy_tailed
from sana_export.synth.recipes import RECIPES
from sana_export.synth.weights import RandomWeights
from tests.support.full_width import LargestHalf, seeded
from tests.support.transformer_cases import Graphs, draw_inputs

COMPONENTS = ("text_encoder", "transformer", "vae")
PROMPT = "a cute 🐼 eating 🎋, ink drawing style"
#: Layers of a transformer block, and the least and largest outlier channel of their inputs, over the median channel.
OUTLIERS = {
    r"attn1\.to_q$": (15, 200),
    r"attn1\.to_out\.0$": (15, 300),
    r"attn2\.to_q$": (15, 300),
    r"attn2\.to_out\.0$": (10, 200),
    r"conv_inverted$": (15, 200),
    r"conv_point$": (100, 10_000),
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = build_pipeline(RECIPES["tiny-random"], hot=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def normal() -> Any:
    return build_pipeline(RECIPES["tiny-random"])


def test_matrices_have_heavy_tails() -> None:
    values = torch.randn(2_000_000, generator=seeded("tails"))
    wanted = values.double() * (TAIL / 2 * values.double().square()).exp()
    heavy = heavy_tailed(values.clone()).double()
    assert (heavy / wanted).std() < 1e-6
    assert heavy.std() == pytest.approx(1, abs=0.01)
    assert 6 < heavy.pow(4).mean() < 12
    assert 15 < heavy.abs().max() < 60


@pytest.mark.parametrize("component", COMPONENTS)
def test_writers_and_readers_agree_on_the_channels(
    component: str, pipeline: Any, normal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the tails, the parameters that rules change differ by the factors alone, and all others are equal."""
    monkeypatch.setattr(weights, "heavy_tailed", lambda values: values)
    shapes = shapes_of(getattr(normal, component))
    plain = getattr(normal, component).state_dict()
    hot = RandomWeights(component, shapes, 0, hot=True)
    seen: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, shape in shapes.items():
        value = torch.cat(list(hot.pieces(name))).view(shape)
        rules = [rule for rule in RULES[component] if re.search(rule.pattern, name)]
        if not rules:
            assert torch.equal(value, plain[name]), name
            continue
        wanted = plain[name].double()
        for rule in rules:
            channels = shape[rule.axis] // (2 if rule.half else 1)
            factors = Heat(component, shapes, 0).factors(name, rule.tensor, channels)
            block = name.split(".attn")[0].split(".ff")[0].split(".scale_shift")[0] if rule.tensor[0] != "/" else ""
            seen.setdefault((block if component == "transformer" else name, rule.tensor), []).append(factors)
            spread = torch.ones(shape[rule.axis]).double()
            spread[:channels] = factors.double()
            along = [-1 if axis == rule.axis else 1 for axis in range(len(shape))]
            if rule.added:
                change = torch.zeros(shape).double() + rule.added * (spread - 1).view(along)
                if rule.row is not None:
                    change[[row for row in range(shape[0]) if row != rule.row]] = 0
                wanted = wanted + change
            else:
                size = factors.double().square().mean().sqrt() if rule.normed else 1.0
                wanted = wanted * (spread**rule.power * size).view(along)
        assert (value - wanted).norm() <= 1e-6 * wanted.norm(), name
    for (place, tensor), all_factors in seen.items():
        assert all(torch.equal(all_factors[0], other) for other in all_factors), (place, tensor)
        large = all_factors[0][all_factors[0] != 1]
        assert len(large) == max(1, len(all_factors[0]) // heat.SPACING)
        assert (large >= FACTORS[0]).all()
        assert (large <= FACTORS[1]).all()
    if component == "transformer":
        readers = {tensor: len(found) for (_, tensor), found in seen.items()}
        assert readers["/stream"] == 1 + 3 * 5 + 1  # patch_embed, five layers of each block, proj_out
        assert readers["value"] == readers["cross value"] - 1 == 2
        assert readers["hidden"] == 3
        assert len({tuple(found[0].tolist()) for (_, tensor), found in seen.items() if tensor == "value"}) == 3


def test_pieces_of_any_size_give_the_same_values(monkeypatch: pytest.MonkeyPatch, pipeline: Any) -> None:
    shapes = shapes_of(pipeline.transformer)
    wanted = pipeline.transformer.state_dict()
    monkeypatch.setattr(weights, "PIECE", 48)
    hot = RandomWeights("transformer", shapes, 0, hot=True)
    for part in ("scale_shift_table", "attn1.to_v.weight", "ff.conv_depth.bias", "ff.conv_point.weight"):
        name = f"transformer_blocks.1.{part}"
        pieces = list(hot.pieces(name))
        assert len(pieces) > 1
        assert torch.allclose(torch.cat(pieces), wanted[name].flatten(), rtol=1e-6), name


def sample(pipeline: Any, stds: list[float]) -> np.ndarray:
    """The image [H, W, 3], 0 to 1. The latents' deviation after each step is added to `stds`."""

    def watch(_pipeline: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        stds.append(state["latents"].std().item())
        return {}

    images = pipeline(
        PROMPT,
        generator=torch.Generator().manual_seed(0),
        height=192,
        width=192,
        num_inference_steps=6,
        use_resolution_binning=False,
        output_type="np",
        callback_on_step_end=watch,
    ).images
    return np.asarray(images[0])


def test_inputs_have_outlier_channels_and_images_stay_in_range(pipeline: Any, normal: Any) -> None:
    ratios: dict[str, float] = {}

    def watch(name: str, module: torch.nn.Module) -> Any:
        def hook(_module: Any, inputs: Any, _output: Any) -> None:
            rows = inputs[0].float()
            rows = rows.flatten(0, -2) if isinstance(module, torch.nn.Linear) else rows.transpose(1, -1).flatten(0, -2)
            sizes = rows.square().mean(0).sqrt()
            ratios[name] = max(ratios.get(name, 0), (sizes.max() / sizes.median()).item())

        return module.register_forward_hook(hook)

    hooks = [
        watch(name, module)
        for name, module in pipeline.transformer.named_modules()
        if any(re.search(key, name) for key in OUTLIERS)
    ]
    stds: list[float] = []
    image = sample(pipeline, stds)
    for hook in hooks:
        hook.remove()
    assert len(ratios) == 3 * len(OUTLIERS)
    for name, ratio in ratios.items():
        least, most = next(limits for key, limits in OUTLIERS.items() if re.search(key, name))
        assert least < ratio < most, (name, ratio)
    assert max(stds) < 6
    spread = 2 * image.std(axis=(0, 1))
    assert ((spread > 0.15) & (spread < 0.7)).all(), spread
    assert ((image == 0) | (image == 1)).mean() < 0.15


def test_sampling_is_not_chaotic(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small change of every prediction changes the image little, as with normal weights. Otherwise no image could be compared."""
    wanted = sample(pipeline, [])
    forward, generator = pipeline.transformer.forward, seeded("noise")

    def noisy(*inputs: Any, **options: Any) -> Any:
        (velocity,) = forward(*inputs, **options)
        return (velocity + 1e-3 * velocity.std() * torch.randn(velocity.shape, generator=generator),)

    monkeypatch.setattr(pipeline.transformer, "forward", noisy)
    assert -10 * math.log10(np.square(sample(pipeline, []) - wanted).mean()) > 50


def test_half_precision_graphs_stay_in_range(pipeline: Any) -> None:
    transformer = pipeline.transformer
    inputs = draw_inputs(transformer.config, (6, 6), (3, 9), "hot")
    state = transformer.state_dict()
    wanted = Graphs(transformer.config, state, "float32", clamp=True).run(inputs)
    with WideProducts(), LargestHalf() as meter:
        found = Graphs(transformer.config, state, "float16", clamp=True).run(inputs)
    assert max(meter.largest.values()) < 65504
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_the_marker_says_hot(tmp_path: Path) -> None:
    folder = make_checkpoint("tiny-random", tmp_path / "hot", hot=True)
    assert json.loads((folder / MARKER).read_text()) == {
        "synthetic": True, "variant": "tiny-random", "dtype": "float32", "seed": 0, "hot": True
    }  # fmt: skip
