"""Whether a pipeline and a bundle are of one checkpoint, found by comparing weights and outputs, not names.

Transformer and ControlNet: rows of every layer that the bundle can find in its files. Text encoder: the state of BOS alone, which
every layer takes part in. Autoencoder: the image of a few latents.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sana_export.commands import export_command
from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Bytes, Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.onnx_weights import read_tensors
from sana_export.integrations.diffusers.transformer import check_pag_layers, pag_layers
from sana_export.known_files import check_known_files
from sana_export.manifest import LoraTarget
from sana_export.runtime.pipeline import SanaRuntime

LOG = logging.getLogger(__name__)
#: How far a weight may be from the pipeline's, relative to its layer's largest: both may be rounded to bfloat16.
WEIGHTS = 2.0**-7
#: How far an output may be from the pipeline's, relative to its norm: in float32, and if one of them is in half precision.
OUTPUTS, HALF_OUTPUTS = 0.005, 0.1


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
            f"{self.runtime.bundle} and the pipeline's {self.name} are not of one checkpoint: {what} differs",
            found=f"{found} in the bundle, which was exported from {self.runtime.manifest.checkpoint.source}",
            wanted=f"{wanted}, as in the pipeline",
            fix="load the pipeline from the bundle's checkpoint, without LoRAs in its weights, or export the pipeline's: "
            + shlex.join(["sana-export", "export", self.pipe.name_or_path or ".", "-o", f"{self.runtime.bundle}-of-the-pipeline"]),
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
        stored = _stored(pair.runtime, graph)
        for target in pair.runtime.manifest.graphs[graph].lora_targets:
            if target.dtype in WEIGHT_DTYPES:
                _check_layer(pair, target, stored)
    _warn_about_precision(pair)


def check_controlnet(pair: ComponentPair) -> None:
    """Raise ArtifactError unless the weights of the ControlNet's self-attentions are the bundle's."""
    stored, dtype = _stored(pair.runtime, "controlnet"), WEIGHT_DTYPES[pair.runtime.manifest.options.dtype]
    for index, block in enumerate(pair.module.transformer_blocks):
        wanted = torch.cat([layer.weight for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)])
        found = stored.get(f"blocks.{index}.qkv")
        values = None if found is None else dtype.widen(found.view(dtype.numpy))
        if values is None or values.size != wanted.numel():
            raise pair.other(f"block {index}", "no such block", "one with weights of its shape")
        _compare(pair, f"block {index}", values.reshape(wanted.shape)[::64], wanted[::64])


def check_text_encoder(pair: ComponentPair) -> None:
    """Raise ArtifactError unless tokenizer and text encoder give the bundle's ids and the bundle's state of BOS."""
    known = pair.runtime.text.instruction
    if (tokenizer := getattr(pair.pipe, "tokenizer", None)) is not None:
        ids = tuple(tokenizer.encode(known.text))
        if ids != known.token_ids:
            raise pair.other(
                "the tokenizer", f"{len(known.token_ids)} tokens for the instruction", f"{len(ids)} tokens, or other ones"
            )
    some = list(known.token_ids[:8])
    table = pair.module.get_input_embeddings().weight
    if table.shape[1] != known.bos_row.size or len(table) <= max(some):
        raise pair.other("the embedding table", list(pair.runtime.text.embeddings.shape), list(table.shape))
    _compare(pair, "the embedding table", pair.runtime.text.embeddings.rows(some), table[some])
    bos = torch.tensor([[known.token_ids[0]]], device=_device(pair.module))
    with torch.no_grad():
        state = pair.module(bos, attention_mask=torch.ones_like(bos))[0][0, 0]
    _compare_outputs(pair, "the state of the first token", torch.from_numpy(known.bos_row.copy()), state)


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
    _compare_outputs(pair, "the decoder (its weights or scaling_factor)", found, wanted)


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
    if problem is not None:
        raise UsageError(
            f"a bundle cannot take the place of the pipeline's {pair.name}: {problem[0]}",
            found=type(module).__name__,
            wanted=problem[1],
        )


def _stored(runtime: SanaRuntime, graph: str) -> Mapping[str, Bytes]:
    """The weights of a graph in the bundle, memory-mapped, by name."""
    fix = export_command(runtime.bundle, runtime.manifest)
    onnx, *data = check_known_files(runtime.bundle, runtime.manifest.graphs[graph].files, fix=fix)
    return read_tensors(onnx, data, fix=fix)


def _check_layer(pair: ComponentPair, target: LoraTarget, stored: Mapping[str, Bytes]) -> None:
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
    dtype = WEIGHT_DTYPES[target.dtype]
    array = stored[target.initializer].view(dtype.numpy).reshape(target.initializer_shape)
    places = [target.row_offset + row for row in rows]
    part = array[:, places].T if target.transposed else array[places]
    own = dtype.widen(np.ascontiguousarray(part)).reshape(len(rows), -1) / np.float32(target.factor)
    _compare(pair, target.module, own, weight[[first + row for row in rows]].flatten(1))


def _compare(pair: ComponentPair, what: str, own: Float32, weight: Tensor) -> None:
    """Raise ArtifactError unless the bundle's weights are those of the pipeline, but for rounding."""
    wanted = weight.detach().float().cpu().numpy()
    limit = WEIGHTS * max(float(np.abs(wanted).max()), 1e-6)
    if not np.abs(own - wanted).max() <= limit:
        raise pair.other(what, *(f"{array.reshape(-1)[:3].round(4).tolist()}..." for array in (own, wanted)))


def _compare_outputs(pair: ComponentPair, what: str, own: Tensor, wanted: Tensor) -> None:
    """Raise ArtifactError unless two outputs are equal but for rounding. Half precision that overflows proves nothing."""
    wanted = wanted.detach().float().cpu()
    if not torch.isfinite(wanted).all():
        LOG.warning(
            "the pipeline's %s gives NaN or infinite values, so it was not compared with %s", pair.name, pair.runtime.bundle
        )
        return
    error = float((own - wanted).norm() / wanted.norm())
    single = {_dtype(pair.module), pair.runtime.manifest.options.dtype} == {"float32"}
    if not error <= (OUTPUTS if single else HALF_OUTPUTS):
        raise pair.other(what, f"an output that is {100 * error:.2g}% away", "the pipeline's output")


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
