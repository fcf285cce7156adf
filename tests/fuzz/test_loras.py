"""LoRA files of any names, shapes, values and configs: the right product, or an error that names what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from sana_export.adapters import Lora, parse_lora, read_lora
from sana_export.errors import ArtifactError, UsageError
from sana_export.lora_config import METADATA
from sana_export.lora_kinds import folded
from sana_export.lora_names import PREFIXES
from sana_export.lora_scales import scales_text
from sana_export.numeric import MOST_SCALE
from tests.fuzz.support import MIB, at_most, inputs
from tests.support.lora_files import SPELLINGS, respelled
from tests.support.lora_kinds import KINDS, adapter, applied

SHAPES = {
    "transformer_blocks.0.attn1.to_q": (6, 4),
    "transformer_blocks.0.attn1.to_k": (6, 4),
    "transformer_blocks.0.attn1.to_v": (6, 4),
    "transformer_blocks.0.attn1.to_out.0": (4, 4),
    "transformer_blocks.10.attn2.to_k": (4, 6),
    "transformer_blocks.0.ff.conv_inverted": (6, 4, 1, 1),
    "transformer_blocks.0.ff.conv_depth": (6, 1, 3, 3),
    "patch_embed.proj": (4, 3, 2, 2),
    "proj_out": (6, 4),
}
LAYERS = st.sampled_from([*SHAPES, "transformer_blocks.9.attn1.to_q", "blocks.0.attn.qkv", "single_blocks.0.linear1", "x", ""])
ENDINGS = st.sampled_from(
    [
        *(
            ".lora_A.weight",
            ".lora_B.weight",
            ".lora_down.weight",
            ".lora_up.weight",
            ".alpha",
            ".lora.down.weight",
            ".lora.up.weight",
        ),
        *(
            ".lora_A.default.weight",
            ".lora_B.other.weight",
            ".lora_mid.weight",
            ".dora_scale",
            ".lora_magnitude_vector",
            ".diff",
            *(f".lokr_w{index}{part}" for index in "12" for part in ("", "_a", "_b")),
            *(f".hada_w{index}_{part}" for index in "12" for part in "ab"),
            ".weight",
            "",
        ),
    ]
)
PREFIX = st.sampled_from(["", *PREFIXES, "lora_te_", "text_encoder.", "_orig_mod."])
SPELLED = st.booleans()
SIZES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
PATTERNS = st.sampled_from(["to_q", r"attn\d.to_k", r"([a-z_.\d]+)+!", "(", ".*.*.*.*x", "\\"])
CONFIGS = st.none() | st.text(max_size=10) | JSON.map(json.dumps) | st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": JSON,
        "alpha": JSON,
        "r": JSON,
        "rank_pattern": JSON | st.dictionaries(PATTERNS, JSON),
        "transformer.lora_alpha": st.integers(1, 9),
        "alpha_pattern": JSON | st.dictionaries(PATTERNS, JSON),
        "use_rslora": JSON,
        "use_dora": JSON,
        "init_lora_weights": JSON,
        "peft_type": JSON | st.sampled_from(["LORA", "LOHA", "LOKR", "IA3"]),
    },
).map(json.dumps)  # fmt: skip


@st.composite
def names(draw: Any) -> str:
    layer = draw(LAYERS)
    return draw(PREFIX) + (layer.replace(".", "_") if draw(SPELLED) else layer) + draw(ENDINGS)


#: Right adapters, for the layer proj_out of [6, 4] and for the fused layer of the original code, of [18, 4].
RIGHT: tuple[dict[str, tuple[int, ...]], ...] = (
    {},
    {"proj_out.lora_A.weight": (2, 4), "proj_out.lora_B.weight": (6, 2)},
    {"proj_out.lokr_w1": (2, 4), "proj_out.lokr_w2_a": (3, 5), "proj_out.lokr_w2_b": (5, 1)},
    {"proj_out.lokr_w1": (3, 2), "proj_out.lokr_w2": (2, 2)},
    {f"proj_out.hada_w{index}_{part}": (6, 2) if part == "a" else (2, 4) for index in "12" for part in "ab"},
    {"proj_out.diff": (6, 4)},
    {
        "blocks.0.attn.qkv.lora_A.weight": (2, 4),
        "blocks.0.attn.qkv.lora_B.weight": (18, 2),
        "blocks.0.attn.qkv.dora_scale": (18, 1),
    },
)
TENSORS = st.builds(
    lambda right, extra, more: {**right, **({extra[0]: extra[1]} if extra is not None else {}), **more},
    st.sampled_from(RIGHT),
    st.none() | st.tuples(st.sampled_from(["proj_out.alpha", "proj_out.dora_scale", "proj_out.lora_magnitude_vector"]), SIZES),
    st.dictionaries(names() | st.text(max_size=8), SIZES, max_size=4),
)


@inputs(8)
@given(TENSORS, CONFIGS, st.floats())
def test_any_names_shapes_and_configs(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], config: str | None, scale: float
) -> None:
    path = tmp_path / "style.safetensors"
    content = {name: np.ones(shape, np.float32) for name, shape in tensors.items() if name != "__metadata__"}
    save_file(content, path, metadata=None if config is None else {METADATA: config})
    try:
        with at_most(4 * MIB):
            folds = read_lora(Lora(path, scale), SHAPES)
    except (ArtifactError, UsageError) as error:
        assert str(path) in str(error)
        assert error.found is not None
        assert isinstance(error, ArtifactError) or not abs(scale) <= MOST_SCALE
        return
    assert folds
    for layer, fold in folds.items():
        assert fold.product().size == math.prod(SHAPES[layer])
        base = np.ones((SHAPES[layer][0], math.prod(SHAPES[layer][1:])), np.float32)
        assert folded(base, [fold]).shape == base.shape


@inputs(3)
@given(
    st.sampled_from(sorted(SPELLINGS)),
    st.sets(st.sampled_from([name for name in SHAPES if "depth" not in name]), min_size=1),
    st.integers(1, 5),
    st.none() | st.floats(0.0625, 64, width=32),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.floats(-2, 2),
    st.integers(0, 2**32),
)
def test_the_product_is_right_in_every_spelling(
    tmp_path: Path, spelling: str, layers: set[str], rank: int, alpha: float | None, dtype: torch.dtype, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in sorted(layers):
        out, *inner = SHAPES[layer]
        kernel = [1] * (len(inner) - 1)
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, *inner, generator=generator).to(dtype)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, rank, *kernel, generator=generator).to(dtype)
    path = tmp_path / "style.safetensors"
    save_torch(respelled(tensors, spelling, alpha), path)
    folds = read_lora(Lora(path, scale), SHAPES)
    assert folds.keys() == layers
    for layer, fold in folds.items():
        up, down = (tensors[f"transformer.{layer}.lora_{matrix}.weight"].double().flatten(1) for matrix in "BA")
        wanted = scale * (1.0 if alpha is None else alpha / rank) * (up @ down)
        assert torch.allclose(torch.from_numpy(fold.product()).double(), wanted, rtol=1e-4, atol=1e-4 * (1 + abs(scale)) * 64)


@inputs(3)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["transformer.{}", "diffusion_model.{}", "lycoris_{}", "lora_unet_{}"]),
    st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 1)),
    st.floats(-2, 2, width=32),
    st.integers(0, 2**32),
)
def test_every_kind_is_right_for_every_shape(
    tmp_path: Path, kind: str, spelling: str, size: tuple[int, int, int], scale: float, seed: int
) -> None:
    layer = "transformer_blocks.0.ff.conv_inverted"
    shape = (size[0], 1 + size[1], 1, 1) if size[2] else size[:2]  # one input and a kernel: depthwise
    if "norms" in kind or "DoRA" in kind:  # norms near 0 would make float32's rounding large
        shape = (3 + shape[0], 3 + shape[1], *shape[2:])
    tensors = adapter(kind, {layer: shape}, seed)
    own = {name.removeprefix(f"transformer.{layer}."): value for name, value in tensors.items()}
    spelled = spelling.format(layer.replace(".", "_") if "_{" in spelling else layer)
    save_torch({f"{spelled}.{end}": value for end, value in own.items()}, tmp_path / "style.safetensors")
    (fold,) = read_lora(Lora(tmp_path / "style.safetensors", scale), {layer: shape}).values()
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = torch.from_numpy(folded(base.flatten(1).numpy(), [fold])).reshape(shape)
    wanted = applied(base, base, own, scale)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))
    parts = [fold.product(slice(first, first + 2)) for first in range(0, shape[0], 2)]
    np.testing.assert_allclose(np.concatenate(parts), fold.product(), rtol=1e-5, atol=1e-5)


SCALES = (
    st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["0.7,attn2=0.5", "attn2=0.5,to_q=-1", "*=3", "a-b=1", "0-9=x", "=1", "a=1,"])
)


@inputs(5)
@given(st.text(max_size=20) | st.builds(lambda path, scale: f"{path}:{scale}", st.text(max_size=5), SCALES))
def test_path_and_scale(text: str) -> None:
    try:
        lora = parse_lora(text)
        assert all(math.isfinite(scale) for scale in (lora.scale, *dict(lora.layer_scales).values()))
        assert parse_lora(f"x:{scales_text(lora.scale, lora.layer_scales)}") == Lora(Path("x"), lora.scale, lora.layer_scales)
    except UsageError as error:
        said = (text, text.rpartition(":")[0])
        assert any(repr(part)[1:-1] in str(error) or part in str(error) for part in said)
