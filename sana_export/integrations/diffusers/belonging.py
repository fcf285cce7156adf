"""Whether a pipeline and a bundle are of one checkpoint, found by comparing weights and outputs, not names.

Transformer and ControlNet: rows of every layer that the bundle can find in its files. Text encoder: the states of a short text.
Autoencoder: the image of a few latents. The weights of a quantized bundle may differ by half a step of their scales; those that
were not rounded to the nearest number are not compared.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.integrations.diffusers.bundle_weights import BundleWeights
from sana_export.integrations.diffusers.module import hooked, members
from sana_export.integrations.diffusers.transformer import attentions, check_pag_layers, pag_layers, unknown_processor
from sana_export.manifest import LoraTarget
from sana_export.quantization.schemes import SCHEMES
from sana_export.runtime.pipeline import SanaRuntime

LOG = logging.getLogger(__name__)
#: How far a weight may be from the pipeline's, relative to its layer's largest: both may be rounded to bfloat16.
WEIGHTS = 2.0**-7
#: How far an output may be from the pipeline's, relative to its norm: in float32, and if one of them is in half precision.
OUTPUTS, HALF_OUTPUTS = 0.005, 0.1
#: The text whose states are compared.
TEXT = "a red fox in the snow, oil painting"


@dataclass(frozen=True)
class ComponentPair:
    """A pipeline's component beside the bundle that shall take its place."""

    name: str
    module: Any
    pipe: Any
    runtime: SanaRuntime

    def other(self, what: str, found: object, wanted: object) -> ArtifactError:
        """The error for a bundle of another checkpoint."""
        return ArtifactError(
            f"{self.runtime.bundle} and the pipeline's {self.name} come from different checkpoints: different {what}",
            found=f"{found} in the bundle, which was exported from {self.runtime.manifest.checkpoint.source}",
            wanted=f"{wanted}, as in the pipeline",
            fix="load the pipeline from the bundle's checkpoint, without LoRAs in its weights, or export the pipeline's: "
            + shlex.join(
                ["sana-export", "export", str(self.pipe.name_or_path or "."), "-o", f"{self.runtime.bundle}-of-the-pipeline"]
            ),
        )


def check_transformer(pair: ComponentPair) -> None:
    """Raise ArtifactError unless config, PAG layers and weights of the transformer are the bundle's."""
    config, model = pair.module.config, pair.runtime.manifest.model
    for what, own, wanted in (
        ("sample_size", model.sample_size, config.sample_size),
        ("in_channels", model.latent_channels, config.in_channels),
        ("caption_channels", model.text_channels, config.caption_channels),
        ("timestep_scale", model.timestep_scale, config.timestep_scale),
        ("guidance_embeds", model.guidance_embeds, config.guidance_embeds),
    ):
        if own != wanted:
            raise pair.other(what, own, wanted)
    if (names := getattr(pair.pipe, "pag_applied_layers", None)) is not None:
        check_pag_layers(pag_layers(names, config.num_layers), pair.runtime)
    for graph in ("denoiser", "context"):
        stored = BundleWeights(pair.runtime, graph)
        for target in pair.runtime.manifest.graphs[graph].lora_targets:
            if target.dtype in WEIGHT_DTYPES:
                _check_layer(pair, target, stored)
    _warn_about_precision(pair)


def check_controlnet(pair: ComponentPair) -> None:
    """Raise ArtifactError unless the weights of the ControlNet's self-attentions are the bundle's."""
    stored = BundleWeights(pair.runtime, "controlnet")
    for index, block in enumerate(pair.module.transformer_blocks):
        wanted = torch.cat([layer.weight for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)])
        name, shape = f"blocks.{index}.qkv", tuple(wanted.shape)
        if stored.size(name) != wanted.numel():
            raise pair.other(f"block {index}", "no such block", "one with weights of its shape")
        own, distance = stored.rows(name, shape, range(0, len(wanted), 64))
        _compare(pair, f"block {index}", own, wanted[::64], distance)


def check_text_encoder(pair: ComponentPair) -> None:
    """Raise ArtifactError unless tokenizer and text encoder give the bundle's ids, and its states of a short text."""
    text = pair.runtime.text
    known, embeddings = text.instruction, text.embeddings
    if (tokenizer := getattr(pair.pipe, "tokenizer", None)) is not None:
        ids = tuple(tokenizer.encode(known.text))
        if ids != known.token_ids:
            raise pair.other("tokenizer", f"{len(known.token_ids)} tokens for the instruction", f"{len(ids)} tokens, or other ones")
    some = list(known.token_ids[:8])
    table = pair.module.get_input_embeddings().weight
    if table.shape[1] != known.bos_row.size or len(table) <= max(some):
        raise pair.other("embedding table", list(embeddings.shape), list(table.shape))
    half = np.float32(0.5)
    distance = np.float32(0) if embeddings.scales is None else embeddings.scales.rows(some)[:, None] * half
    _compare(pair, "embedding table", embeddings.rows(some), table[some], distance)
    encoded = pair.runtime.encode_prompt(TEXT, False, complex_human_instruction=None)
    tokens = torch.tensor([text.tokenize(TEXT, max_sequence_length=300).ids], device=_device(pair.module))
    with torch.no_grad():
        states = pair.module(tokens, attention_mask=torch.ones_like(tokens))[0]
    own = torch.from_numpy(encoded.prompt_embeds[:, : tokens.shape[1]])
    _compare_outputs(pair, "text_encoder", "states of a short text", own, states)


def check_vae(pair: ComponentPair) -> None:
    """Raise ArtifactError unless the decoder gives the bundle's image of a few latents."""
    module, runtime = pair.module, pair.runtime
    factor, model = module.spatial_compression_ratio, runtime.manifest.model
    if (factor, module.config.latent_channels) != (model.vae_scale_factor, model.latent_channels):
        raise pair.other("latents", [model.latent_channels, model.vae_scale_factor], [module.config.latent_channels, factor])
    side = (runtime.backend.ranges("vae_decoder") or {}).get("latent_height", (1, 1, 1))[0]
    latents = torch.randn(1, model.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    found = torch.from_numpy(runtime.to_host(runtime.run("vae_decoder", {"latents": latents.numpy()})["image"]))
    scaled = (latents / module.config.scaling_factor).to(_device(module), module.dtype)
    with torch.no_grad():
        wanted = module.decoder(scaled)
    _compare_outputs(pair, "vae_decoder", "decoder (weights or scaling_factor)", found, wanted)


#: How each component of a pipeline is compared with a bundle.
CHECKS: Mapping[str, Callable[[ComponentPair], None]] = {
    "text_encoder": check_text_encoder,
    "transformer": check_transformer,
    "vae": check_vae,
    "controlnet": check_controlnet,
}


def check_plain(pair: ComponentPair, kind: type[nn.Module]) -> None:
    """Raise UsageError unless the component is a plain one of its class, with its weights and without what a bundle ignores."""
    module = pair.module
    problem = None
    if not isinstance(module, kind):
        problem = f"it is a {type(module).__name__}", f"a {kind.__name__}"
    elif any(hasattr(one, name) for name in ("_hf_hook", "_diffusers_hook") for one in module.modules()):
        problem = "it is offloaded or has hooks", "a pipeline without offloading: pipe.remove_all_hooks()"
    elif getattr(module, "peft_config", None):
        problem = "it has a LoRA", "pipe.unload_lora_weights() first, then use_bundle(...).runtime.load_lora(path, scale)"
    elif any(parameter.is_meta for parameter in module.parameters()):
        problem = "it has no weights", "a pipeline with its weights"
    elif (changed := hooked(members(module))) is not None:
        problem = f"{changed} has a hook or a replaced method", "a pipeline without; hooks on the component work after use_bundle"
    elif hasattr(module, "transformer_blocks") and (strange := unknown_processor(attentions(module))) is not None:
        problem = f"it has {strange}", "the processors of diffusers' Sana pipelines"
    if problem is not None:
        raise UsageError(
            f"a bundle cannot take the place of the pipeline's {pair.name}: {problem[0]}",
            found=type(module).__name__,
            wanted=problem[1],
        )


def _check_layer(pair: ComponentPair, target: LoraTarget, stored: BundleWeights) -> None:
    """Compare a few rows of a layer's weight with the bundle's."""
    try:
        weight = pair.module.get_submodule(target.module).weight
    except AttributeError:
        weight = None
    if weight is None or tuple(weight.shape) != tuple(target.shape):
        found = "no such layer" if weight is None else list(weight.shape)
        raise pair.other(target.module, list(target.shape), found)
    first, end = target.source_rows or (0, target.shape[0])
    rows = sorted({0, (end - first) // 2, end - first - 1})
    places = [target.row_offset + row for row in rows]
    own = stored.rows(target.initializer, target.initializer_shape, places, dtype=target.dtype, transposed=target.transposed)
    numbers, distance = (array / np.float32(target.factor) for array in own)
    _compare(pair, target.module, numbers, weight[[first + row for row in rows]].flatten(1), np.abs(distance))


def _compare(pair: ComponentPair, what: str, own: Float32, weight: Tensor, distance: Float32 | np.float32) -> None:
    """Raise ArtifactError unless the bundle's weights are those of the pipeline, but for rounding and `distance`."""
    wanted = weight.detach().float().cpu().numpy()
    limit = WEIGHTS * max(float(np.abs(wanted).max()), 1e-6)
    if not (np.abs(own - wanted) <= limit + distance).all():
        raise pair.other(what, *(f"{array.reshape(-1)[:3].round(4).tolist()}..." for array in (own, wanted)))


def _compare_outputs(pair: ComponentPair, graph: str, what: str, own: Tensor, wanted: Tensor) -> None:
    """Raise ArtifactError unless an output of `graph` is the pipeline's, but for rounding. Overflow proves nothing."""
    wanted = wanted.detach().float().cpu()
    if not torch.isfinite(wanted).all():
        LOG.warning(
            "the pipeline's %s gives NaN or infinite values, so it was not compared with %s", pair.name, pair.runtime.bundle
        )
        return
    error = float((own - wanted).norm() / wanted.norm())
    if not error <= _output_limit(pair, graph):
        raise pair.other(what, f"an output that is {100 * error:.2g}% away", "the pipeline's output")


def _output_limit(pair: ComponentPair, graph: str) -> float:
    """How far an output of `graph` may be from the pipeline's, relative to its norm."""
    options = pair.runtime.manifest.options
    limit = OUTPUTS if {_dtype(pair.module), options.dtype} == {"float32"} else HALF_OUTPUTS
    scheme = options.scheme(graph)
    # Vectors of one norm whose cosine is c are sqrt(2 - 2 * c) of the norm apart.
    return limit if scheme is None else max(limit, math.sqrt(2 - 2 * SCHEMES[scheme].cosine_limit))


def _warn_about_precision(pair: ComponentPair) -> None:
    own, theirs = pair.runtime.manifest.options.dtype, _dtype(pair.module)
    if own != theirs:
        LOG.info(
            "the pipeline's transformer is in %s, %s in %s: images are in the bundle's precision", theirs, pair.runtime.bundle, own
        )


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _dtype(module: nn.Module) -> str:
    """The contract's name of the dtype that most of a component's weights have."""
    return str(next(module.parameters()).dtype).removeprefix("torch.")
