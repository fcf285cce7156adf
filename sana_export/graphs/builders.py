"""How each deployment graph is built from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.graphs.blend import Blend
from sana_export.graphs.context import Context
from sana_export.graphs.controlnet import ControlNet
from sana_export.graphs.denoiser import Denoiser
from sana_export.graphs.lora_targets import trace_lora_targets
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.postprocess import Postprocess
from sana_export.graphs.sampler import Sampler
from sana_export.graphs.text_encoder import TextEncoder
from sana_export.graphs.vae_decoder import VaeDecoder, VaeDecoderHead, VaeDecoderTail
from sana_export.graphs.vae_encoder import VaeEncoder, VaeEncoderHead, VaeEncoderTail
from sana_export.manifest import LoraTarget, Options

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class GraphBuilder:
    """How to build one graph."""

    #: The component of the checkpoint whose config and weights it needs; None if it needs none.
    component: str | None
    make: Callable[[Config, Weights, Options], nn.Module]


def _plain(component: str, graph: type[nn.Module]) -> GraphBuilder:
    return GraphBuilder(component, lambda config, weights, options: graph(config, weights, NUMERICS[options.dtype]))


def _denoiser(config: Config, weights: Weights, options: Options) -> nn.Module:
    return Denoiser(config, weights, NUMERICS[options.dtype], clamp=options.clamp, pag_layers=options.pag_layers)


def _controlnet(config: Config, weights: Weights, options: Options) -> nn.Module:
    return ControlNet(config, weights, NUMERICS[options.dtype], clamp=options.clamp)


BUILDERS: dict[str, GraphBuilder] = {
    "text_encoder": _plain("text_encoder", TextEncoder),
    "context": _plain("transformer", Context),
    "denoiser": GraphBuilder("transformer", _denoiser),
    "sampler": GraphBuilder(None, lambda config, weights, options: Sampler()),
    "vae_decoder": _plain("vae", VaeDecoder),
    "vae_decoder_head": _plain("vae", VaeDecoderHead),
    "vae_decoder_tail": _plain("vae", VaeDecoderTail),
    "postprocess": GraphBuilder(None, lambda config, weights, options: Postprocess()),
    "vae_encoder": _plain("vae", VaeEncoder),
    "vae_encoder_head": _plain("vae", VaeEncoderHead),
    "vae_encoder_tail": _plain("vae", VaeEncoderTail),
    "controlnet_context": _plain("controlnet", Context),
    "controlnet": GraphBuilder("controlnet", _controlnet),
    "blend": GraphBuilder(None, lambda config, weights, options: Blend()),
}


def build_graph(name: str, checkpoint: SanaCheckpoint, options: Options) -> nn.Module:
    """The deployment graph `name` with the checkpoint's weights, ready to run."""
    component, make = BUILDERS[name].component, BUILDERS[name].make
    if component is None:
        return make({}, {}, options).eval()
    return make(checkpoint.config(component), checkpoint.weights(component), options).eval()


def shape_graph(name: str, checkpoint: SanaCheckpoint, options: Options) -> nn.Module:
    """The deployment graph `name` without values: its parameters are on the meta device."""
    component, make = BUILDERS[name].component, BUILDERS[name].make
    if component is None:
        return make({}, {}, options)
    with torch.device("meta"):
        return make(checkpoint.config(component), checkpoint.weights(component).on_meta(), options)


def lora_targets(name: str, checkpoint: SanaCheckpoint, options: Options) -> tuple[LoraTarget, ...]:
    """Where the graph `name` stores the transformer's layers. Empty for a graph of another component."""
    if BUILDERS[name].component != "transformer":
        return ()
    config = checkpoint.config("transformer")
    return trace_lora_targets(
        lambda weights: BUILDERS[name].make(config, weights, options), checkpoint.weights("transformer").on_meta()
    )
