"""The configs of the synthetic checkpoints: those of every published one, and small ones for tests and timings (data only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sana_export.architectures import AUTOENCODER, LITE, TEXT_ENCODER
from sana_export.autoencoders import AUTOENCODERS
from sana_export.variants import VARIANTS

Config = Mapping[str, Any]


@dataclass(frozen=True)
class SyntheticRecipe:
    """The configs of a checkpoint's components, as keyword arguments of their classes.

    A variation of it: `dataclasses.replace(recipe, transformer={**recipe.transformer, "qk_norm": "rms_norm_across_heads"})`.
    """

    #: The alias of its row in variants.py.
    name: str
    #: `SanaTransformer2DModel`.
    transformer: Config
    #: `AutoencoderDC`.
    vae: Config
    #: `Gemma2Model`. Without a `vocab_size`, it gets that of the tokenizer.
    text_encoder: Config
    #: The class that `_class_name` names.
    scheduler: Config

    @property
    def pipeline(self) -> str:
        """The class that model_index.json names."""
        return "SanaSprintPipeline" if self.scheduler["_class_name"] == "SCMScheduler" else "SanaPipeline"


#: Gemma-2 uses soft capping, which only this implementation has.
_EAGER = {"attn_implementation": "eager"}
_GEMMA = {key: value for key, value in TEXT_ENCODER.items() if key != "vocab_size"} | _EAGER

#: Parameters in millions, text encoder + transformer + autoencoder (its decoder):
#: tiny-random 0.38 + 0.97 + 0.58 (0.43) = 1.93, 7.9 MB in float32; mid 20.6 + 60.1 + 21.2 (19.3) = 101.9, 408 MB.
_TINY: dict[str, Config] = {
    "vae": {
        **AUTOENCODER,
        "encoder_block_out_channels": (16, 16, 32, 32, 32, 32),
        "decoder_block_out_channels": (16, 32, 32, 64, 64, 64),
        "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1, 1),
    },
    "text_encoder": {
        **_GEMMA,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        # Not equal to head_dim, so that tests fail if a graph confuses the two.
        "query_pre_attn_scalar": 48,
    },
}
_MID: dict[str, Config] = {
    "vae": {
        **AUTOENCODER,
        "encoder_block_out_channels": (32, 64, 128, 128, 128, 128),
        "decoder_block_out_channels": (64, 128, 256, 256, 512, 512),
        "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
        "decoder_layers_per_block": (2, 2, 2, 2, 1, 1),
    },
    "text_encoder": {
        **_GEMMA,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
    },
}
_SMALL = {"tiny-random": _TINY, "tiny-sprint": _TINY, "mid": _MID}
_WIDTHS = {"tiny": _TINY, "mid": _MID}
_FULL: dict[str, Config] = {"vae": AUTOENCODER, "text_encoder": TEXT_ENCODER | _EAGER}

RECIPES: dict[str, SyntheticRecipe] = {
    alias: SyntheticRecipe(
        name=alias,
        transformer=variant.transformer,
        scheduler=variant.scheduler,
        **_SMALL.get(alias, _FULL),
    )
    for alias, variant in VARIANTS.items()
    if not variant.embedded
}


def with_decoder(vae: Config, decoder: str) -> Config:
    """The autoencoder `vae` with the decoder `decoder` (a row of autoencoders.DECODERS) at its own widths.

    A small autoencoder also keeps its own depths, except for the stage that DC-AE-Lite does not have.
    """
    if decoder == "dc-ae":
        return vae
    depths = tuple(vae["decoder_layers_per_block"])
    full = depths == AUTOENCODER["decoder_layers_per_block"]
    return {**vae, **LITE} | ({} if full else {"decoder_layers_per_block": (0, *depths[1:])})


def recipe_with_decoder(recipe: SyntheticRecipe, decoder: str) -> SyntheticRecipe:
    """The checkpoint `recipe` with the decoder `decoder`."""
    return replace(recipe, vae=with_decoder(recipe.vae, decoder))


#: The configs of the synthetic autoencoders: those of every row of autoencoders.AUTOENCODERS.
AUTOENCODER_RECIPES: dict[str, Config] = {
    alias: with_decoder(_WIDTHS.get(alias.removesuffix(f"-{row.decoder}"), _FULL)["vae"], row.decoder)
    for alias, row in AUTOENCODERS.items()
}
