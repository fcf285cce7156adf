"""`bench --decoders`: the work, the times and the parity of decoders beside each other."""

from __future__ import annotations

import pytest

from sana_export.bench.work.count import BUNDLE, REFERENCE
from tests.support.command_line import Cli

NAMES = ("tiny-dc-ae", "tiny-dc-ae-lite")


def test_decoders_are_timed_and_compared_in_turns(cli: Cli) -> None:
    ran = cli("bench", "--decoders", *NAMES, "--sides", 64, 96, "--rounds", 1, "--threads", 1, "--json")
    assert ran.code == 0, ran.err
    rows = {(row["vae"], row["side"], row["whose"]): row for row in ran.json["times"]}
    assert set(rows) == {(vae, side, whose) for vae in NAMES for side in (64, 96) for whose in (BUNDLE, REFERENCE)}
    for (vae, side, whose), row in rows.items():
        assert row["ms"]["n"] == row["ratio"]["n"] == 1
        assert row["ms"]["median"] > 0
        if vae == NAMES[0]:
            assert row["ratio"]["median"] == 1.0
        # Work is proportional to the number of pixels, up to the small products of attention.
        assert row["flop"] / side**2 == pytest.approx(rows[vae, 64, whose]["flop"] / 64**2, rel=0.02)
    lite = [rows[NAMES[1], 64, whose]["flop"] for whose in (BUNDLE, REFERENCE)]
    # A graph in float32 also has a small product in each norm.
    assert lite[0] == pytest.approx(lite[1], rel=0.01)
    assert lite[0] < rows[NAMES[0], 64, BUNDLE]["flop"]
    assert [row["name"] for row in ran.json["parity"]] == [f"{vae} at {side} px" for side in (64, 96) for vae in NAMES]
    assert ran.json["passed"] is True
    assert min(row["psnr_db"] for row in ran.json["parity"]) > 100
    assert (ran.json["threads"], set(ran.json["versions"]) >= {"torch", "onnxruntime"}) == (1, True)


def test_a_side_that_does_not_fit_is_refused(cli: Cli) -> None:
    ran = cli("bench", "--decoders", NAMES[1], "--sides", 100)
    assert ran.code == 2
    assert "100 px with tiny-dc-ae-lite" in ran.err
    assert "--sides 96" in ran.err
