"""Each layer's weight is where its LoraTarget says. To prove it, each layer is changed alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana_export.architectures import ARCHITECTURES
from sana_export.graphs.lora_targets import trace_lora_targets
from sana_export.graphs.numerics import NUMERICS, parameter
from sana_export.manifest import LoraTarget
from tests.support.lora_target_cases import TINY, Weights, graphs, matrices, shapes

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm and guidance": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
    # 112 ** -0.5 is not a power of two. Positions as in the 2K checkpoint.
    "heads of 112": {
        "num_attention_heads": 7,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 224,
        "interpolation_scale": 1.0,
    },
}


@pytest.mark.parametrize("precision", NUMERICS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_target_is_exactly_what_its_layer_changes(config: dict[str, Any], precision: str) -> None:
    config = {**TINY, **config}
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: sums and products with powers of two are exact in every precision.
    weights = {name: torch.randint(-8, 9, value.shape, generator=generator).float() for name, value in shapes(config).items()}
    found: dict[str, list[LoraTarget]] = {}
    for name, build in graphs(config, precision).items():
        before = dict(build(weights).named_parameters())
        rows = trace_lora_targets(build, {key: value.to("meta") for key, value in weights.items()})
        for module in {row.module: None for row in rows}:
            own = found[module] = [row for row in rows if row.module == module]
            delta = torch.randint(1, 4, own[0].shape, generator=generator).float()
            after = dict(build({**weights, f"{module}.weight": weights[f"{module}.weight"] + delta}).named_parameters())
            changed = {key for key in before if not torch.equal(before[key], after[key])}
            assert changed == {row.initializer for row in own}, (name, own)
            for row in own:
                assert_slice(before[row.initializer], after[row.initializer], row, delta)
    assert set(found) == matrices(weights)
    for rows in found.values():
        assert_whole(rows)


def assert_whole(rows: list[LoraTarget]) -> None:
    """The targets of a layer cover each of its rows once, in order."""
    parts = [row.source_rows or (0, row.shape[0]) for row in rows]
    assert [row.source_rows is None for row in rows] == [len(rows) == 1] * len(rows)
    assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == rows[0].shape[0]


def assert_slice(before: Tensor, after: Tensor, row: LoraTarget, delta: Tensor) -> None:
    """The parameter changed by the target's factor times `delta` in the target's slice, and nowhere else."""
    assert (tuple(before.shape), str(before.dtype)) == (row.initializer_shape, f"torch.{row.dtype}")
    wanted = torch.zeros(row.initializer_shape)
    delta = delta[slice(*(row.source_rows or (None, None)))]
    last = row.row_offset + delta.shape[0]
    if row.transposed:
        wanted[:, row.row_offset : last] = row.factor * delta.flatten(1).T
    else:
        wanted[row.row_offset : last] = row.factor * delta.reshape(-1, *row.initializer_shape[1:])
    difference = after.float() - before.float()
    if math.log2(row.factor).is_integer():
        assert torch.equal(difference, wanted)
    else:  # both parameters were rounded to the dtype
        assert torch.equal(difference != 0, wanted != 0)
        assert (difference - wanted).abs().max() <= 2 * torch.finfo(before.dtype).eps * after.float().abs().max()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name[0].isupper()])
def test_every_matrix_of_the_published_configs_has_a_target(name: str) -> None:
    config = ARCHITECTURES[name].transformer(1024)
    weights = shapes(config)
    rows = [row for build in graphs(config, "float16").values() for row in trace_lora_targets(build, weights)]
    assert {row.module for row in rows} == matrices(weights)
    assert len(matrices(weights)) > 200
    halved = {module for module in matrices(weights) if module.endswith("conv_inverted")}
    assert len(rows) == len(matrices(weights)) + len(halved)
    for module in halved:
        assert_whole([row for row in rows if row.module == module])


def test_a_layer_that_cannot_be_followed_has_no_target() -> None:
    """Neither has one that the graph uses twice, once directly and once through another operator."""

    class Graph(nn.Module):
        def __init__(self, weights: Weights) -> None:
            super().__init__()
            self.plain = parameter(weights["a.weight"], torch.float32)
            self.twice = parameter(weights["b.weight"], torch.float32)
            self.sums = parameter(weights["b.weight"].sum(0), torch.float32)
            self.square = parameter(weights["c.weight"].square(), torch.float32)
            self.mixed = parameter(torch.cat([weights["d.weight"], torch.ones(2, 4)]), torch.float32)

    weights = {f"{name}.weight": torch.empty(4, 4, device="meta") for name in "abcd"}
    assert [row.module for row in trace_lora_targets(Graph, weights)] == ["a"]


def test_transposed_square_matrices_are_recognized() -> None:
    class Graph(nn.Module):
        def __init__(self, weights: Weights) -> None:
            super().__init__()
            self.a = parameter(weights["a.weight"].T, torch.float32)
            self.b = parameter(weights["b.weight"].T.T * 3.0, torch.float32)
            self.c = parameter(weights["c.weight"].permute(0, 1), torch.float32)
            self.d = parameter(weights["d.weight"].transpose(0, 1), torch.float32)

    weights = {f"{name}.weight": torch.empty(4, 4, device="meta") for name in "abcd"}
    rows = trace_lora_targets(Graph, weights)
    found = {row.module: (row.transposed, row.factor) for row in rows}
    assert found == {"a": (True, 1.0), "b": (False, 3.0), "d": (True, 1.0)}  # c's permutation is not one that transposes
