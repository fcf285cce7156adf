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
from sana_export.lora_names import PREFIXES
from sana_export.numeric import MOST_SCALE
from tests.fuzz.support import MIB, at_most, inputs
from tests.support.lora_files import SPELLINGS, respelled

SHAPES = {
    "transformer_blocks.0.attn1.to_q": (6, 4),
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
            ".lokr_w1",
            ".hada_w1_a",
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
        "transformer.lora_alpha": st.integers(1, 9),
        "alpha_pattern": JSON | st.dictionaries(PATTERNS, JSON),
        "use_rslora": JSON,
        "use_dora": JSON,
        "init_lora_weights": JSON,
        "peft_type": JSON,
    },
).map(json.dumps)  # fmt: skip


@st.composite
def names(draw: Any) -> str:
    layer = draw(LAYERS)
    return draw(PREFIX) + (layer.replace(".", "_") if draw(SPELLED) else layer) + draw(ENDINGS)


#: A right LoRA, and one with an alpha of any shape.
RIGHT = {"proj_out.lora_A.weight": (2, 4), "proj_out.lora_B.weight": (6, 2)}
TENSORS = st.builds(
    lambda right, alpha, more: {**(RIGHT if right else {}), **({"proj_out.alpha": alpha} if alpha is not None else {}), **more},
    st.booleans(),
    st.none() | SIZES,
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


@inputs(5)
@given(
    st.text(max_size=20) | st.builds(lambda path, scale: f"{path}:{scale}", st.text(max_size=5), st.floats() | st.text(max_size=5))
)
def test_path_and_scale(text: str) -> None:
    try:
        assert math.isfinite(parse_lora(text).scale)
    except UsageError as error:
        said = (text, text.rpartition(":")[0])
        assert any(repr(part)[1:-1] in str(error) or part in str(error) for part in said)
