"""Adapters of every kind in the arrays of a bundle, against graphs that are built with the adapter folded in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_export.adapters import Lora
from sana_export.checkpoint.fold_lora import fold_loras
from sana_export.checkpoint.weights import Weights, read_headers
from sana_export.errors import ArtifactError
from sana_export.graphs.lora_targets import trace_lora_targets
from sana_export.manifest import LoraTarget
from sana_export.runtime.lora_values import lora_values, read_adapter, touched
from tests.runtime.test_lora_values import DTYPES, as_bytes, as_tensor
from tests.support.lora_kinds import KINDS, adapter
from tests.support.lora_target_cases import TINY, graphs, matrices, shapes

#: Layers with their own array, in a joined one, transposed, scaled, and in two halves.
LAYERS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "ff.conv_inverted",
    "ff.conv_point",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights that every precision represents exactly."""
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randint(-8, 9, value.shape, generator=generator).float() / 64 for name, value in shapes(TINY).items()}
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(weights, path)
    return Weights(read_headers([path]))


Built = dict[str, tuple[Any, tuple[LoraTarget, ...], dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def built(base: Weights) -> Callable[[str], Built]:
    """A function of a precision: by graph, the function that builds it, its targets and its own arrays."""

    @cache
    def build_all(precision: str) -> Built:
        found = {}
        for name, build in graphs(TINY, precision).items():
            own = {key: as_bytes(value) for key, value in build(base).named_parameters()}
            found[name] = build, trace_lora_targets(build, base.on_meta()), own
        return found

    return build_all


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, precision) for kind in KINDS for precision in ("float32", "float16")),
        *((kind, "bfloat16") for kind in ("LoKr", "DoRA of PEFT", "DoRA of columns")),
    ],
)
def test_a_kind_in_arrays_equals_the_graph_with_it_folded_in(
    base: Weights, built: Callable[[str], Built], tmp_path: Path, kind: str, precision: str
) -> None:
    """Alone and after a plain LoRA, on which nothing of it may depend."""
    layers = {layer: tuple(base.shape(f"{layer}.weight")) for layer in sorted(matrices(shapes(TINY)))}
    chosen = {
        layer: shape
        for layer, shape in layers.items()
        if layer == "proj_out" or layer.endswith(tuple(f"1.{end}" for end in LAYERS))
    }
    loras = []
    for seed, one in enumerate((kind, "LoRA")):
        save_file(adapter(one, chosen, seed), tmp_path / f"{seed}.safetensors")
        loras.append(Lora(tmp_path / f"{seed}.safetensors", 0.6))
    changed = 0
    for stack in (loras[:1], loras[::-1]):
        for build, targets, own in built(precision).values():
            known = [LoraTarget(layer, shape, "", (), "") for layer, shape in layers.items()]
            adapters = [read_adapter(lora, known) for lora in stack]
            names = touched(targets, adapters)
            kept = {name: own[name].copy() for name in names}
            found = lora_values(own, targets, adapters, names)
            for name, wanted in build(fold_loras(base, stack)).named_parameters():
                if name not in names:
                    continue
                value, wide = as_tensor(found[name], DTYPES[precision]).float(), wanted.float()
                if precision == "float32":
                    assert (value - wide).abs().max() <= 1e-6 * wide.abs().max(), name
                else:  # W was rounded in the bundle, which changes norms by less than a bit: the sum is rounded once more
                    step = torch.finfo(wanted.dtype).eps * wide.abs().clamp_min(wide.abs().max() / 8)
                    assert ((value - wide).abs() <= 2 * step).all(), name
                assert np.array_equal(own[name], kept[name])
                changed += 1
    assert changed >= 2 * 7


def test_a_dora_needs_all_rows_of_its_layer(base: Weights, built: Callable[[str], Built], tmp_path: Path) -> None:
    layer = "transformer_blocks.1.ff.conv_inverted"
    save_file(adapter("DoRA of columns", {layer: tuple(base.shape(f"{layer}.weight"))}), tmp_path / "x.safetensors")
    _, targets, own = built("float32")["denoiser"]
    halves = [target for target in targets if target.module == layer]
    assert len(halves) == 2
    adapters = [read_adapter(Lora(tmp_path / "x.safetensors"), halves)]
    assert len(lora_values(own, halves[::-1], adapters, touched(halves, adapters))) == 2
    with pytest.raises(ArtifactError, match=f"{layer} of this bundle cannot take a DoRA"):
        lora_values(own, halves[:1], adapters, touched(halves[:1], adapters))
