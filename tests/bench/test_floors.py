"""The computed page: its counts against known figures, its text against the committed page."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_export.bench.work import floors
from sana_export.synth.recipes import AUTOENCODER_RECIPES

PAGE = Path(__file__).parents[2] / "benchmarks" / "floors.md"
#: TFLOP of one step of diffusers and of its decoder, computed independently from the layers' shapes.
STEP = {
    **{("600M", 512): 0.63, ("600M", 1024): 2.24, ("600M", 2048): 8.69, ("600M", 4096): 34.5},
    **{("1600M", 512): 1.67, ("1600M", 1024): 5.93, ("1600M", 2048): 22.97, ("1600M", 4096): 91.1},
}
#: FLOP of DC-AE-Lite at 1024 px, from its layers: blocks and upsampling of stages 5 to 1, first and last convolution.
LITE = 18 * sum(
    [
        32**2 * (32 * 1024 + 4 * 2 * 1024**2),
        64**2 * 4 * 2 * 1024**2 + 32**2 * 1024 * 4 * 1024,
        128**2 * 4 * 2 * 512**2 + 64**2 * 1024 * 4 * 512,
        256**2 * 5 * 2 * 512**2 + 128**2 * 512 * 4 * 512,
        512**2 * 3 * 2 * 256**2 + 256**2 * 512 * 4 * 256,
        512**2 * 256 * 4 * 3,
    ]
)
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
    """At 4096 px: 512 features in tiles of 128 with a halo of 7. With DC-AE-Lite 128 features in tiles of 32 with a halo of 18."""
    found = {alias: floors.image_shape(4096, AUTOENCODER_RECIPES[alias]) for alias in floors.DECODERS.values()}
    assert {alias: (shape.features, set(shape.windows), len(shape.windows)) for alias, shape in found.items()} == {
        "dc-ae": ((512, 512), {(142, 142)}, 16),
        "dc-ae-lite": ((128, 128), {(68, 68)}, 9),
    }


@pytest.fixture(scope="module")
def found_decoders() -> list[floors.DecoderFloor]:
    return list(floors.decoder_floors())


def test_the_decoders_work(found: list[floors.Floor], found_decoders: list[floors.DecoderFloor]) -> None:
    decoders = {(floor.decoder, floor.side): floor for floor in found_decoders}
    for floor in found:
        assert decoders["DC-AE", floor.side].ours == floor.ours["vae_decoder"]
        assert decoders["DC-AE", floor.side].reference.flop == floor.reference["vae_decoder"].flop
    for side in floors.SIDES:
        assert decoders["DC-AE-Lite", side].reference.flop < decoders["DC-AE", side].reference.flop
    # A pixel shuffle has nothing to restate: the same products as diffusers, except in overlapping windows.
    one = decoders["DC-AE-Lite", 1024]
    assert one.ours.flop == one.reference.flop == LITE
    assert decoders["DC-AE-Lite", 4096].ours.flop / (16 * LITE) == pytest.approx(9 * 68**2 / 128**2, rel=0.01)


def test_the_committed_page_is_what_the_code_writes(
    found: list[floors.Floor], found_decoders: list[floors.DecoderFloor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "floors", lambda: iter(found))
    monkeypatch.setattr(floors, "decoder_floors", lambda: iter(found_decoders))
    assert PAGE.read_text("utf-8") == floors.markdown(), "sana-export bench --floor > benchmarks/floors.md"
