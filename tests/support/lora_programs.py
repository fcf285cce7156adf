"""One file of each kind that the programs that train Sana write, with numbers at random: for the table in docs/lora.md.

diffusers and PEFT write their files themselves. The other programs are not installed where tests run: their files have the names
and shapes that their source, in the version given here, writes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from tests.support.lora_files import TARGETS, diffusers_lora, flat, load_transformer, randomized
from tests.support.lora_kinds import adapter

LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_v", "transformer_blocks.1.ff.conv_inverted")
Make = Callable[[SanaCheckpoint, Path], Path]


@dataclass(frozen=True)
class Written:
    """One kind of file."""

    #: The program, and the version that was looked at.
    program: str
    #: What it writes.
    what: str
    #: A name of one of its tensors.
    name: str
    #: Writes such a file for a checkpoint into a folder; returns what `--lora` gets.
    make: Make


def _shapes(checkpoint: SanaCheckpoint) -> dict[str, tuple[int, ...]]:
    weights = checkpoint.weights("transformer")
    return {layer: tuple(weights.shape(f"{layer}.weight")) for layer in LAYERS}


def _save(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path = folder / "style.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items() if name}, path, metadata=dict(metadata or {}))
    return path


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str, str], str]) -> dict[str, Tensor]:
    """The tensors of `adapter`, with `rename(layer, end)` as their names."""
    found = {}
    for name, value in tensors.items():
        layer = next(layer for layer in LAYERS if name.startswith(f"transformer.{layer}."))
        found[rename(layer, name.removeprefix(f"transformer.{layer}."))] = value
    return found


def of_kind(kind: str, rename: Callable[[str, str], str]) -> Make:
    """A file with the adapters of a kind of lora_kinds.py."""
    return lambda checkpoint, folder: _save(folder, _renamed(adapter(kind, _shapes(checkpoint)), rename), {"lycoris_config": "{}"})


def with_ends(rename: Callable[[str, str], str], **ends: tuple[int, ...]) -> Make:
    """A file with these ends of names and shapes of tensors for every layer."""
    spelled = {end.replace("__", "."): shape for end, shape in ends.items()}
    return lambda checkpoint, folder: _save(
        folder, {rename(layer, end): torch.ones(shape) for layer in LAYERS for end, shape in spelled.items()}
    )


def of_peft(**kind: object) -> Make:
    """A folder that PEFT saved. `kind` has the name of the config's class and its options."""

    def make(checkpoint: SanaCheckpoint, folder: Path) -> Path:
        import peft

        options = {"target_modules": list(TARGETS), **kind}
        config = getattr(peft, str(options.pop("config")))(**options)
        with warnings.catch_warnings():  # PEFT has doubts about biases
            warnings.simplefilter("ignore")
            model = randomized(peft.get_peft_model(load_transformer(checkpoint), config))
            model.save_pretrained(str(folder / "lora"))
        return folder / "lora"

    return make


def of_diffusers(**options: object) -> Make:
    return lambda checkpoint, folder: diffusers_lora(load_transformer(checkpoint), folder / "lora", r=4, **options)


def original_peft(checkpoint: SanaCheckpoint, folder: Path) -> Path:
    """PEFT on a model of the original code: its names, and a config beside it."""
    width = _shapes(checkpoint)[LAYERS[0]][1]
    (folder / "lora").mkdir()
    tensors = {"lora_A.weight": torch.ones(4, width), "lora_B.weight": torch.ones(3 * width, 4)}
    save_file(
        {f"base_model.model.blocks.0.attn.qkv.{end}": value for end, value in tensors.items()},
        folder / "lora" / "adapter_model.safetensors",
    )
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder / "lora"


def _diffusers(layer: str, end: str) -> str:
    return f"transformer.{layer}.{end}"


def _ab(prefix: str) -> Callable[[str, str], str]:
    """Names with dots and lora_A and lora_B after `prefix`."""
    return lambda layer, end: f"{prefix}{layer}.{end.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"


def _lycoris(layer: str, end: str) -> str:
    return f"lycoris_{flat(layer)}.{end}"


def _kohya(layer: str, end: str) -> str:
    return f"lora_unet_{flat(layer)}.{end}"


def _folded_alpha(layer: str, end: str) -> str:
    """Without alpha, which the format multiplies into lora_B: its tensor gets a name that `_save` leaves out."""
    return "" if end == "alpha" else _ab("transformer.")(layer, end)


def _norms(layer: str, end: str) -> str:
    return f"{_folded_alpha(layer, end)}.weight" if end == "lora_magnitude_vector" else _folded_alpha(layer, end)


def with_text_encoder(checkpoint: SanaCheckpoint, folder: Path) -> Path:
    tensors = _renamed(adapter("LoRA", _shapes(checkpoint)), _diffusers)
    return _save(folder, {**tensors, "text_encoder.layers.0.self_attn.q_proj.lora_down.weight": torch.ones(2, 2)})


def with_embeddings(checkpoint: SanaCheckpoint, folder: Path) -> Path:
    return _save(
        folder, {**_renamed(adapter("LoRA", _shapes(checkpoint)), _diffusers), "bundle_emb.<style>.gemma": torch.ones(2, 2)}
    )


DIFFUSERS, PEFT = "diffusers 0.42.1", "PEFT 0.21.0"
SIMPLE, LYCORIS, ONE = "SimpleTuner (bc8e6ab)", "LyCORIS 4.1.3", "OneTrainer (23df383)"
#: The files, in the order of the table.
WRITTEN = (
    Written(DIFFUSERS, "LoRA, `train_dreambooth_lora_sana.py`", "transformer.….lora_A.weight", of_diffusers(lora_alpha=6)),
    Written(DIFFUSERS, "DoRA", "transformer.….lora_magnitude_vector", of_diffusers(use_dora=True)),
    Written(
        "NVlabs/Sana (cab0681)",
        "LoRA, `train_lora.sh`: the script of diffusers",
        "transformer.….lora_A.weight",
        of_diffusers(metadata=False),
    ),
    Written(
        "NVlabs/Sana (06af561)",
        "LoRA, `sol_rl/train_sana.py`: PEFT on the original code",
        "base_model.model.blocks.0.attn.qkv.lora_A.weight",
        original_peft,
    ),
    Written(PEFT, "LoRA", "base_model.model.….lora_A.weight", of_peft(config="LoraConfig", r=4)),
    Written(PEFT, "DoRA", "base_model.model.….lora_magnitude_vector", of_peft(config="LoraConfig", r=4, use_dora=True)),
    Written(PEFT, "LoHa", "base_model.model.….hada_w1_a", of_peft(config="LoHaConfig", r=4)),
    Written(PEFT, "LoKr", "base_model.model.….lokr_w1", of_peft(config="LoKrConfig", r=4)),
    Written(PEFT, "LoRA with biases", "base_model.model.….lora_B.bias", of_peft(config="LoraConfig", r=4, lora_bias=True)),
    Written(PEFT, "(IA)³", "base_model.model.….ia3_l", of_peft(config="IA3Config", feedforward_modules=[])),
    Written(PEFT, "OFT", "base_model.model.….oft_R.weight", of_peft(config="OFTConfig", oft_block_size=4, target_modules=["to_q"])),
    Written(SIMPLE, "LoKr, its example for Sana: whole matrices", "lycoris_….lokr_w1", of_kind("LoKr, whole matrices", _lycoris)),
    Written(SIMPLE, "LoRA", "transformer.….lora_A.weight", of_diffusers(lora_alpha=4)),
    Written(LYCORIS, "LoRA (locon)", "lycoris_….lora_down.weight", of_kind("LoRA", _lycoris)),
    Written(LYCORIS, "LoKr", "lycoris_….lokr_w2_a", of_kind("LoKr, both factors products", _lycoris)),
    Written(LYCORIS, "LoHa", "lycoris_….hada_w1_a", of_kind("LoHa", _lycoris)),
    Written(LYCORIS, "these with `dora_wd`, norms of outputs", "lycoris_….dora_scale", of_kind("LoHa with norms", _lycoris)),
    Written(LYCORIS, "these with `dora_wd`, norms of inputs", "lycoris_….dora_scale", of_kind("LoKr with norms", _lycoris)),
    Written(LYCORIS, "full, layers without biases", "lycoris_….diff", of_kind("diff", _lycoris)),
    Written(LYCORIS, "full, layers with biases", "lycoris_….diff_b", with_ends(_lycoris, diff=(2, 2), diff_b=(2,))),
    Written(LYCORIS, "norms (`train_norm`)", "lycoris_….w_norm", with_ends(_lycoris, w_norm=(2,))),
    Written(LYCORIS, "(IA)³", "lycoris_….on_input", with_ends(_lycoris, weight=(2,), on_input=())),
    Written(LYCORIS, "Diag-OFT, BOFT", "lycoris_….oft_blocks", with_ends(_lycoris, oft_blocks=(2, 2, 2), alpha=())),
    Written(LYCORIS, "GLoRA", "lycoris_….a1.weight", with_ends(_lycoris, a1__weight=(2, 2), a2__weight=(2, 2))),
    Written(LYCORIS, "T-LoRA", "lycoris_….lambda_layer", with_ends(_lycoris, lambda_layer=(1, 2), q_layer__weight=(2, 2))),
    Written(ONE, "LoRA, format DIFFUSERS", "transformer.….lora_A.weight", of_kind("LoRA", _folded_alpha)),
    Written(ONE, "LoRA, format KOHYA", "lora_unet_….lora_down.weight", of_kind("LoRA", _kohya)),
    Written(ONE, "LoRA, format ORIGINAL", "transformer_blocks.….lora_A.weight", of_kind("LoRA", _ab(""))),
    Written(ONE, "LoRA, format COMFY", "diffusion_model.….lora_A.weight", of_kind("LoRA", _ab("diffusion_model."))),
    Written(ONE, "LoRA, backup", "transformer.….lora_down.weight", of_kind("LoRA", _diffusers)),
    Written(ONE, "DoRA, norms of inputs (its default)", "lora_unet_….dora_scale", of_kind("DoRA of columns", _kohya)),
    Written(
        ONE,
        "DoRA, norms of outputs, format DIFFUSERS",
        "transformer.….lora_magnitude_vector.weight",
        of_kind("DoRA of PEFT", _norms),
    ),
    Written(ONE, "LoHa", "transformer.….hada_w1_a", of_kind("LoHa", _diffusers)),
    Written(ONE, "LoKr", "transformer.….lokr_w1", of_kind("LoKr", _diffusers)),
    Written(ONE, "OFT", "transformer.….oft_R.weight", with_ends(_diffusers, oft_R__weight=(2, 6))),
    Written(ONE, "with the text encoder", "text_encoder.….lora_down.weight", with_text_encoder),
    Written(ONE, "with embeddings", "bundle_emb.….gemma", with_embeddings),
)
