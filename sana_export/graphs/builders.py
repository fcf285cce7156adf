"""Checkpoint to torch modules: how each deployment graph is built from its components."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sana_export.graphs.checkpoint import SanaCheckpoint
from sana_export.graphs.context import Context
from sana_export.graphs.denoiser import Denoiser
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.postprocess import Postprocess
from sana_export.graphs.sampler import Sampler
from sana_export.graphs.text_encoder import TextEncoder
from sana_export.graphs.vae_decoder import VaeDecoder, VaeDecoderHead, VaeDecoderTail
from sana_export.manifest import Options


def _component_graph(component: str, graph: type[nn.Module]) -> Callable[[SanaCheckpoint, Options], nn.Module]:
    def build(checkpoint: SanaCheckpoint, options: Options) -> nn.Module:
        return graph(checkpoint.config(component), checkpoint.weights(component), NUMERICS[options.dtype])

    return build


def _denoiser(checkpoint: SanaCheckpoint, options: Options) -> nn.Module:
    return Denoiser(
        checkpoint.config("transformer"),
        checkpoint.weights("transformer"),
        NUMERICS[options.dtype],
        clamp=options.clamp,
        pag_layers=options.pag_layers,
    )


BUILDERS: dict[str, Callable[[SanaCheckpoint, Options], nn.Module]] = {
    "text_encoder": _component_graph("text_encoder", TextEncoder),
    "context": _component_graph("transformer", Context),
    "denoiser": _denoiser,
    "sampler": lambda checkpoint, options: Sampler(),
    "vae_decoder": _component_graph("vae", VaeDecoder),
    "vae_decoder_head": _component_graph("vae", VaeDecoderHead),
    "vae_decoder_tail": _component_graph("vae", VaeDecoderTail),
    "postprocess": lambda checkpoint, options: Postprocess(),
}


def build_graph(name: str, checkpoint: SanaCheckpoint, options: Options) -> nn.Module:
    """The deployment graph `name` with the checkpoint's weights, ready to run."""
    return BUILDERS[name](checkpoint, options).eval()
