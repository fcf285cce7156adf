"""What calibration keeps of the inputs of layers."""

from __future__ import annotations

import numpy as np
import torch

from sana_export.calibration.observer import GraphInputs, InputSample


def test_the_sample_is_uniform_and_the_maximum_is_of_everything() -> None:
    sample = InputSample(2, 50)
    rows = torch.arange(2000, dtype=torch.float32).reshape(1000, 2)
    for first in range(0, 1000, 130):  # batches of other sizes than the sample's
        sample.add(rows[first : first + 130])
    assert sample.rows.shape == (50, 2)
    assert sample.maximum.tolist() == [1998.0, 1999.0]
    kept = sample.rows[:, 0] / 2
    assert len(set(kept)) == 50  # no row twice
    assert abs(kept.mean() - 500) < 150  # standard error: 41
    assert (np.diff(kept) > 0).all()  # in the order in which they were seen
    again = InputSample(2, 50)
    for first in range(0, 1000, 130):
        again.add(rows[first : first + 130])
    np.testing.assert_array_equal(sample.rows, again.rows)


def test_a_short_run_keeps_all_rows() -> None:
    sample = InputSample(3, 10)
    sample.add(-torch.ones(4, 3))
    assert sample.rows.shape == (4, 3)
    assert sample.maximum.tolist() == [1, 1, 1]


def test_layers_that_read_one_tensor_in_a_row_share_a_sample() -> None:
    seen, x, y = GraphInputs(8), torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    for _ in range(2):
        seen.add("value", x, -2)
        seen.add("gate", x, -2)
        seen.add("point", y, -1)
    assert seen.owners == {"value": "value", "gate": "value", "point": "point"}
    assert seen.samples["value"].rows.shape == (8, 4)  # 2 runs of 5 tokens, 8 of them kept
    assert seen.samples["point"].rows.shape == (8, 5)
    assert seen.samples["value"].maximum.shape == (4,)
