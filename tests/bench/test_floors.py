"""The computed page: its counts against known figures, its text against the committed page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sana_export.bench.work import floors
from sana_export.bench.work.networks import MetaWeights
from sana_export.checkpoint.configs import expected_shapes
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoderTail, tile_halo, tile_scale
from sana_export.synth.recipes import RECIPES

PAGE = Path(__file__).parents[2] / "benchmarks" / "floors.md"
#: TFLOP of one step of diffusers and of its decoder, computed independently from the layers' shapes.
STEP = {
    **{("600M", 512): 0.63, ("600M", 1024): 2.24, ("600M", 2048): 8.69, ("600M", 4096): 34.5},
    **{("1600M", 512): 1.67, ("1600M", 1024): 5.93, ("1600M", 2048): 22.97, ("1600M", 4096): 91.1},
}
DECODER = {512: 2.09, 1024: 8.37, 4096: 133.9}


@pytest.fixture(scope="module")
def found() -> list[floors.Floor]:
    return list(floors.floors())


def test_the_references_work_is_known(found: list[floors.Floor]) -> None:
    for floor in found:
        step, decoder = floor.reference["denoise_step"].flop / 1e12, floor.reference["vae_decoder"].flop / 1e12
        assert step == pytest.approx(STEP[floor.model, floor.side], rel=0.005)
        if floor.side in DECODER:
            assert decoder == pytest.approx(DECODER[floor.side], rel=0.005)


def test_ours_is_less_work_at_every_size(found: list[floors.Floor]) -> None:
    for floor in found:
        assert floor.ours["denoise_step"].flop < floor.reference["denoise_step"].flop
        assert floor.ours["end_to_end"].flop < floor.reference["end_to_end"].flop
        assert floor.ours["text_encoder"].flop < floor.reference["text_encoder"].flop / 20
    # Work is proportional to the number of pixels, except for work per prompt.
    sides = {floor.side: floor.ours["denoise_step"].flop for floor in found if floor.model == "1600M"}
    assert sides[2048] / sides[1024] == pytest.approx(4, rel=0.001)


def test_windows_are_those_of_the_published_decoder() -> None:
    config = RECIPES["sana-1600m-1024px"].vae
    with torch.device("meta"):
        tail = VaeDecoderTail(config, MetaWeights(expected_shapes("vae", config)), NUMERICS["float16"])
    assert (tile_halo(tail), tile_scale(config)) == (floors.TILE_HALO, floors.TILE_SCALE)


def test_the_committed_page_is_what_the_code_writes(found: list[floors.Floor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "floors", lambda: iter(found))
    assert PAGE.read_text("utf-8") == floors.markdown(), "sana-export bench --floor > benchmarks/floors.md"
