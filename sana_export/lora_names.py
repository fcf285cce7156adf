"""Names of the tensors in LoRA files: which layer of Sana's transformer each belongs to, whatever program wrote the file.

| program | a name |
|---|---|
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight, also ...to_q.lora.down.weight |
| PEFT | base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight, also ...lora_A.default.weight |
| ComfyUI, ai-toolkit | diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| kohya, LyCORIS | lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight |
| OneTrainer | lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight, lora_transformer.transformer_blocks.0.... |

Layers may have their names in the original Sana code too (original_names.py), such as diffusion_model.blocks.0.attn.qkv. What a
name ends with says which tensor of which kind of adapter it is (`KINDS`). A name counts only if exactly one layer fits it. The
layers are those of the model, so names are never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sana_export.errors import ArtifactError
from sana_export.formats.network_names import NETWORKS, ORIGINAL_SANA, NamePattern, find_first, without_wrappers
from sana_export.original_names import original_layers

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

#: The most tensors of a file. LyCORIS writes at most 7 for each of the 700 layers of Sana 4.8B.
_MOST_TENSORS = 100_000

#: How a name ends: the layer, then the role of the tensor in it, then the adapter's name if the file has it.
_ADAPTER = r"(\.(?P<adapter>(?!weight$)[^.]+))?"
_ENDINGS = (
    (re.compile(rf"\.lora_(?P<role>[AB]){_ADAPTER}\.weight$"), ""),
    (re.compile(r"\.lora[._](?P<role>down|up)\.weight$"), ""),
    (re.compile(r"\.lora_linear_layer\.(?P<role>down|up)\.weight$"), ""),
    (re.compile(r"(?<=\.to_[qkv])_lora\.(?P<role>down|up)\.weight$"), ""),
    (re.compile(r"(?<=\.to_out)_lora\.(?P<role>down|up)\.weight$"), ".0"),
    (re.compile(rf"\.(?P<role>hada_w[12]_[ab]|lokr_w[12](_[ab])?){_ADAPTER}$"), ""),
    (re.compile(rf"\.(?P<role>lora_magnitude_vector){_ADAPTER}(\.weight)?$"), ""),
    (re.compile(r"\.(?P<role>alpha|dora_scale|diff)$"), ""),
)
_ROLES = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude"}
#: How an error calls the tensors of these roles.
_SPOKEN = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}

_LOKR = tuple(
    (*first, *second)
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
#: The kinds of adapters: the tensors of a layer, by their roles. One of these tuples must be complete.
KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "LoRA": (("down", "up"),),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "LoKr": _LOKR,
    "diff": (("diff",),),
}
#: What a layer may have besides: alpha, and the norms of a DoRA as PEFT and as LyCORIS store them.
_EXTRA = {"LoRA": {"alpha", "magnitude", "dora_scale"}, "LoHa": {"alpha", "dora_scale"}, "LoKr": {"alpha", "dora_scale"}}

_TEXT_ENCODER = NamePattern(
    "for the text encoder too", r"^(base_model\.model\.)?(lora_te\d*_|text_encoders?(_\d)?\.|te\d*[._]|lora_text_|bundle_emb\.)"
)
#: Adapters whose change of a weight is computed in no way that is written here, and adapters for other things than weights.
_OTHER_KINDS = (
    NamePattern("an OFT or BOFT", r"\.(oft|boft)_"),
    NamePattern("a GLoRA", r"\.[ab][12]\.weight$"),
    NamePattern("an (IA)³", r"\.(ia3_l|on_input)"),
    NamePattern("a VeRA, RandLora or VB-LoRA", r"\.(vera|randlora|vblora)_"),
    NamePattern("a T-LoRA", r"\.(lambda_layer|[pq]_layer\.weight)$"),
    NamePattern("a LoRA with Tucker decomposition", r"\.(lora_mid\b|hada_t[12]|lokr_t[12])"),
    NamePattern("a LoRA with norms", r"\.([wb]_norm)$"),
    NamePattern("a LoRA with biases", r"\.lora_(B|up)(\.[^.]+)?\.bias$|\.lora\.up\.bias$|\.diff_b$"),
    NamePattern("a LoRA with embeddings", r"\.lora_embedding_[AB]"),
    NamePattern("a LoRA with whole weights", r"\.set_weight$|\.(base_layer|modules_to_save)\."),
    NamePattern("a textual inversion embedding", r"^(emb_params|string_to_param|clip_[lg]|<[^>]+>)$"),
)
#: Part of the name of every LoRA's tensor.
_ANY_LORA = re.compile(r"lora|lokr_|hada_|\.(alpha|dora_scale|diff)$")


@dataclass(frozen=True)
class Parts:
    """The tensors of one layer in a file."""

    #: A key of `KINDS`.
    kind: str
    #: The names of the tensors by their roles. Which ones there are depends on the kind; alpha and norms are optional.
    names: Mapping[str, str]
    #: The layer's name in diffusers, or in the original code if it has the names of that.
    module: str
    #: The layers of diffusers that it is, from top to bottom. Only fused layers of the original code are more than one.
    layers: tuple[str, ...]


def is_lora(names: Iterable[str]) -> bool:
    """Whether one of these names of tensors is part of a LoRA file of any kind."""
    return any(_ANY_LORA.search(name) for name in names)


def find_parts(path: Path, names: Iterable[str], layers: Iterable[str]) -> tuple[Parts, ...]:
    """The tensors of each layer in the LoRA file `path` with the tensors `names`.

    `layers` are the layers of the transformer, and each is in one of the results at most. Raises ArtifactError, naming a tensor and
    what it is, if not every tensor is one of an adapter of a known kind on these layers.
    """
    known = list(names)
    _check_kind(path, known)
    table = _Layers(path, layers)
    found: dict[str, dict[str, str]] = {}
    adapters: dict[str, str] = {}
    for name in known:
        module, role, adapter = table.parse(name)
        if adapter is not None:
            adapters.setdefault(adapter, name)
        if role in found.setdefault(module, {}):
            raise _twice(path, module, found[module][role], name)
        found[module][role] = name
    if len(adapters) > 1:
        raise ArtifactError(
            f"the LoRA {path} contains several adapters",
            found=" and ".join(adapters.values()),
            wanted="one adapter in each file",
            fix="save each adapter to a file of its own",
        )
    parts = tuple(_complete(path, module, table.originals.get(module, (module,)), roles) for module, roles in found.items())
    _check_together(path, parts)
    return parts


def _check_together(path: Path, parts: Iterable[Parts]) -> None:
    """Raise ArtifactError if two of `parts` change one layer, or if only some layers have the norms of PEFT's DoRA."""
    owners: dict[str, Parts] = {}
    for part in parts:
        for layer in part.layers:
            if layer in owners:
                raise _twice(path, layer, next(iter(owners[layer].names.values())), next(iter(part.names.values())))
            owners[layer] = part
    if not any("magnitude" in part.names for part in owners.values()):
        return
    if (plain := next((part for part in owners.values() if "magnitude" not in part.names), None)) is not None:
        raise _incomplete(path, plain.module, ["magnitude"], "lora_A, lora_B and lora_magnitude_vector of each layer")


def _twice(path: Path, module: str, first: str, second: str) -> ArtifactError:
    return ArtifactError(
        f"the LoRA {path} has two tensors for one matrix of {module}",
        found=f"{first} and {second}",
        wanted="one LoRA in each file",
        fix="save each LoRA to a file of its own",
    )


def _check_kind(path: Path, names: list[str]) -> None:
    """Raise ArtifactError if the tensors are those of something else than an adapter for a transformer."""
    if not names:
        raise ArtifactError(f"the LoRA {path} is empty", found="no tensors", wanted="lora_A and lora_B of at least one layer")
    if len(names) > _MOST_TENSORS:
        raise ArtifactError(
            f"the LoRA {path} has too many tensors",
            found=len(names),
            wanted=f"at most {_MOST_TENSORS}",
            fix="download the LoRA again",
        )
    if (found := find_first(_OTHER_KINDS, names)) is not None:
        raise ArtifactError(
            f"the LoRA {path} is {found[0].what}, which is not supported",
            found=found[1],
            wanted="a LoRA, DoRA, LoHa or LoKr, or differences of weights",
            fix="merge it into the model with the program that trained it, and export the merged checkpoint",
        )
    if (name := _TEXT_ENCODER.find(names)) is not None:
        raise ArtifactError(
            f"the LoRA {path} changes the text encoder, which is not supported",
            found=name,
            wanted="only layers of the transformer, such as transformer_blocks.0.attn1.to_q",
            fix="train the transformer alone",
        )
    if not is_lora(names):
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
        #: The layers of diffusers by their names in the original code.
        self.originals = original_layers(self._names)
        self._names |= self.originals.keys()
        self._flat: dict[str, list[str]] = {}
        for name in self._names:
            self._flat.setdefault(name.replace(".", "_"), []).append(name)

    def parse(self, name: str) -> tuple[str, str, str | None]:
        """The layer of a tensor, its role, and the adapter that it names."""
        for ending, suffix in _ENDINGS:
            if (found := ending.search(name)) is not None:
                layer = self._find(name, name[: found.start()] + suffix)
                role = found["role"]
                return layer, _ROLES.get(role, role), found.groupdict().get("adapter")
        self._refuse_foreign(name)
        raise ArtifactError(
            f"the LoRA {self._path} contains a tensor of an unknown kind",
            found=name,
            wanted="names that end like .lora_A.weight, .lora_down.weight, .lokr_w1, .hada_w1_a, .diff or .alpha",
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
        if found is None or found[0] is ORIGINAL_SANA:
            return
        raise ArtifactError(
            f"the LoRA {self._path} belongs to another model",
            found=f"{name}, a layer of {found[0].what}",
            wanted="layers of Sana's transformer, such as transformer_blocks.0.attn1.to_q",
            fix="use a LoRA that was trained on this checkpoint",
        )


def _complete(path: Path, module: str, layers: tuple[str, ...], roles: Mapping[str, str]) -> Parts:
    """The layer's tensors, by `roles`. Raises ArtifactError if some are missing or if they are not those of one kind."""
    kind = next((kind for kind, choices in KINDS.items() if any(role in roles for choice in choices for role in choice)), "LoRA")
    given = set(roles) - _EXTRA.get(kind, set())
    # The choice with which the fewest tensors are left over or missing.
    choice = min(KINDS[kind], key=lambda choice: len(given.symmetric_difference(choice)))
    if missing := [role for role in choice if role not in roles]:
        wanted = "lora_A and lora_B of each layer" if kind == "LoRA" else f"{', '.join(choice)} of each layer"
        raise _incomplete(path, module, missing, wanted)
    extra = [roles[role] for role in sorted(given.difference(choice))]
    if {"magnitude", "dora_scale"} <= roles.keys():
        extra.append(roles["dora_scale"])
    if extra:
        raise ArtifactError(
            f"the LoRA {path} has tensors of several kinds for {module}",
            found=f"{roles[choice[0]]} and {extra[0]}",
            wanted=f"only those of one {kind}",
            fix="save each LoRA to a file of its own",
        )
    return Parts(kind, roles, module, layers)


def _incomplete(path: Path, module: str, missing: list[str], wanted: str) -> ArtifactError:
    return ArtifactError(
        f"the LoRA {path} is incomplete",
        found=f"no {_SPOKEN.get(missing[0], missing[0])} of {module}",
        wanted=wanted,
        fix="download the LoRA again",
    )
