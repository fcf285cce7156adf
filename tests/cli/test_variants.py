"""`sana-export variants` lists the whole table."""

from __future__ import annotations

from sana_export.variants import VARIANTS
from tests.support.command_line import Cli


def test_variants_list_every_row(cli: Cli) -> None:
    rows = {row["alias"]: row for row in cli("variants", "--json").json["variants"]}
    assert set(rows) == set(VARIANTS)
    assert rows["sana-1600m-4kpx-bf16"]["flow_shift"] == 6.0
    text = cli("variants").out
    for variant in VARIANTS.values():
        assert variant.alias in text
        assert variant.source in text
