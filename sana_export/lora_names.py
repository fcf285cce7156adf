"""Names of the tensors in LoRA files: which layer of Sana's transformer each belongs to, whatever program wrote the file.

| program | a name |
|---|---|
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight, also ...to_q.lora.down.weight |
| PEFT | base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight, also ...lora_A.default.weight |
| ComfyUI, ai-toolkit | diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| kohya, LyCORIS | lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight |
| OneTrainer | lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight, lora_transformer.transformer_blocks.0.... |

A name counts only if exactly one layer fits it. The layers are those of the model, so names are never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sana_export.errors import ArtifactError
from sana_export.formats.network_names import NETWORKS, ORIGINAL_SANA, NamePattern, find_first, without_wrappers

#: Prefixes of layer names.
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer.",
    "lora_unet.",
    "unet.",
    "model.",
    "module.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "diffusion_model_",
)
#: The prefix of PEFT's names.
PEFT_PREFIX = "base_model.model."
#: The depthwise convolution of every block. No graph supports a LoRA on it.
DEPTHWISE = "ff.conv_depth"
#: A convolution next to it, which the tables of bundles contain.
_BESIDE_DEPTHWISE = "ff.conv_inverted"

#: How a name ends: the layer, then the role of the tensor in it.
_ENDINGS = (
    (re.compile(r"\.lora_(?P<role>[AB])(\.(?P<adapter>[^.]+))?\.weight$"), ""),
    (re.compile(r"\.lora[._](?P<role>down|up)\.weight$"), ""),
    (re.compile(r"\.lora_linear_layer\.(?P<role>down|up)\.weight$"), ""),
    (re.compile(r"(?<=\.to_[qkv])_lora\.(?P<role>down|up)\.weight$"), ""),
    (re.compile(r"(?<=\.to_out)_lora\.(?P<role>down|up)\.weight$"), ".0"),
    (re.compile(r"\.(?P<role>alpha)$"), ""),
)
_ROLES = {"A": "down", "B": "up", "down": "down", "up": "up", "alpha": "alpha"}

_TEXT_ENCODER = NamePattern(
    "for the text encoder too", r"^(base_model\.model\.)?(lora_te\d*_|text_encoders?(_\d)?\.|te\d*[._]|lora_text_)"
)
#: Adapters that are more than a product of two matrices.
_OTHER_KINDS = (
    NamePattern("a DoRA", r"lora_magnitude_vector|dora_scale|\.magnitude$"),
    NamePattern("a LoKr", r"\.lokr_"),
    NamePattern("a LoHa", r"\.hada_"),
    NamePattern("an OFT or BOFT", r"\.(oft|boft)_"),
    NamePattern("a GLoRA", r"\.[ab][12]\.weight$"),
    NamePattern("an (IA)³", r"\.(ia3_l|on_input)"),
    NamePattern("a VeRA, RandLora or VB-LoRA", r"\.(vera|randlora|vblora)_"),
    NamePattern("a LoRA with Tucker decomposition (LoCon)", r"\.lora_mid\b"),
    NamePattern("a LoRA with biases", r"\.lora_(B|up)(\.[^.]+)?\.bias$|\.lora\.up\.bias$"),
    NamePattern("a LoRA with embeddings", r"\.lora_embedding_[AB]"),
    NamePattern("a LoRA with whole weights", r"\.(diff|diff_b|w_norm|b_norm|set_weight)$|\.(base_layer|modules_to_save)\."),
    NamePattern("a textual inversion embedding", r"^(emb_params|string_to_param|clip_[lg]|<[^>]+>)$"),
)
#: Part of the name of every LoRA's tensor.
_ANY_LORA = re.compile(r"lora|\.alpha$")


@dataclass(frozen=True)
class Parts:
    """The tensors of one layer: the names of A and B, and of its alpha if the file has one."""

    down: str
    up: str
    alpha: str | None


def find_parts(path: Path, names: Iterable[str], layers: Iterable[str]) -> dict[str, Parts]:
    """The tensors of each layer in the LoRA file `path` with the tensors `names`, by layer.

    `layers` are the layers of the transformer. Raises ArtifactError, naming a tensor and what it is, if not every tensor is one of
    a plain LoRA on these layers.
    """
    known = list(names)
    _check_kind(path, known)
    table = _Layers(path, layers)
    found: dict[str, dict[str, str]] = {}
    adapters: dict[str, str] = {}
    for name in known:
        layer, role, adapter = table.parse(name)
        if adapter is not None:
            adapters.setdefault(adapter, name)
        if role in found.setdefault(layer, {}):
            raise ArtifactError(
                f"the LoRA {path} has two tensors for one matrix of {layer}",
                found=f"{found[layer][role]} and {name}",
                wanted="one LoRA in each file",
                fix="save each LoRA to a file of its own",
            )
        found[layer][role] = name
    if len(adapters) > 1:
        raise ArtifactError(
            f"the LoRA {path} contains several adapters",
            found=" and ".join(adapters.values()),
            wanted="one adapter in each file",
            fix="save each adapter to a file of its own",
        )
    return {layer: _complete(path, layer, roles) for layer, roles in found.items()}


def _check_kind(path: Path, names: list[str]) -> None:
    """Raise ArtifactError if the tensors are those of something else than a plain LoRA on a transformer."""
    if not names:
        raise ArtifactError(f"the LoRA {path} is empty", found="no tensors", wanted="lora_A and lora_B of at least one layer")
    if (found := find_first(_OTHER_KINDS, names)) is not None:
        raise ArtifactError(
            f"the LoRA {path} is {found[0].what}, which is not supported",
            found=found[1],
            wanted="a plain LoRA: only lora_A and lora_B of each layer",
            fix="merge it into the model with the program that trained it, and export the merged checkpoint",
        )
    if (name := _TEXT_ENCODER.find(names)) is not None:
        raise ArtifactError(
            f"the LoRA {path} changes the text encoder, which is not supported",
            found=name,
            wanted="only layers of the transformer, such as transformer_blocks.0.attn1.to_q",
            fix="train the transformer alone",
        )
    if not any(_ANY_LORA.search(name) for name in names):
        known = find_first(NETWORKS, names)
        raise ArtifactError(
            f"{path} is not a LoRA",
            found=f"{names[0]}, a weight of {known[0].what}" if known else f"{names[0]}, a whole weight",
            wanted="names like transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
            fix="if it is a whole Sana transformer, use --transformer instead of --lora",
        )


class _Layers:
    """The layers of the transformer, by their names and by their names with underscores."""

    def __init__(self, path: Path, layers: Iterable[str]) -> None:
        self._path = path
        self._names = set(layers)
        self._names |= {name.replace(_BESIDE_DEPTHWISE, DEPTHWISE) for name in self._names if name.endswith(_BESIDE_DEPTHWISE)}
        self._flat: dict[str, list[str]] = {}
        for name in self._names:
            self._flat.setdefault(name.replace(".", "_"), []).append(name)

    def parse(self, name: str) -> tuple[str, str, str | None]:
        """The layer of a tensor, its role, and the adapter that it names."""
        for ending, suffix in _ENDINGS:
            if (found := ending.search(name)) is not None:
                layer = self._find(name, name[: found.start()] + suffix)
                return layer, _ROLES[found["role"]], found.groupdict().get("adapter")
        self._refuse_foreign(name)
        raise ArtifactError(
            f"the LoRA {self._path} contains a tensor of an unknown kind",
            found=name,
            wanted="names that end in .lora_A.weight, .lora_B.weight, .lora_down.weight, .lora_up.weight or .alpha",
            fix="save it as a plain LoRA, with the names of diffusers or PEFT",
        )

    def _find(self, name: str, written: str) -> str:
        layer = without_wrappers(written)
        while True:
            if layer in self._names:
                return layer
            fitting = self._flat.get(layer.replace(".", "_"), [])
            if len(fitting) == 1:
                return fitting[0]
            if len(fitting) > 1:
                raise ArtifactError(
                    f"the LoRA {self._path} contains a name that fits several layers",
                    found=f"{name}: {' or '.join(sorted(fitting))}",
                    wanted="names with dots",
                    fix="save it with the names of diffusers or PEFT",
                )
            prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None)
            if prefix is None:
                break
            layer = layer.removeprefix(prefix)
        self._refuse_foreign(name)
        raise ArtifactError(
            f"the LoRA {self._path} belongs to another model",
            found=f"{layer}, which this transformer does not have (the tensor {name})",
            wanted="layers of this checkpoint's transformer, such as transformer_blocks.0.attn1.to_q",
            fix="use a LoRA that was trained on this checkpoint",
        )

    def _refuse_foreign(self, name: str) -> None:
        """Raise ArtifactError if `name` is one of another network."""
        found = find_first(NETWORKS, [without_wrappers(name)])
        if found is None:
            return
        if found[0] is ORIGINAL_SANA:
            raise ArtifactError(
                f"the LoRA {self._path} has the layer names of the original Sana code, which are not supported",
                found=name,
                wanted="layer names of diffusers, such as transformer_blocks.0.attn1.to_q",
                fix="train it on a checkpoint whose name ends in _diffusers, or merge it and export the merged checkpoint",
            )
        raise ArtifactError(
            f"the LoRA {self._path} belongs to another model",
            found=f"{name}, a layer of {found[0].what}",
            wanted="layers of Sana's transformer, such as transformer_blocks.0.attn1.to_q",
            fix="use a LoRA that was trained on this checkpoint",
        )


def _complete(path: Path, layer: str, roles: Mapping[str, str]) -> Parts:
    if missing := [role for role in ("down", "up") if role not in roles]:
        raise ArtifactError(
            f"the LoRA {path} is incomplete",
            found=f"no {'lora_A' if missing == ['down'] else 'lora_B'} of {layer}",
            wanted="lora_A and lora_B of each layer",
            fix="download the LoRA again",
        )
    return Parts(roles["down"], roles["up"], roles.get("alpha"))
