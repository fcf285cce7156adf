"""Counts the work of a checkpoint's models from their configs alone, with modules on PyTorch's meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from sana_export.bench.work.call_shape import CallShape, GraphWork, with_totals
from sana_export.bench.work.count import Work
from sana_export.bench.work.torch import torch_work
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.configs import expected_shapes, read_part
from sana_export.export.example_inputs import graph_spec
from sana_export.graphs.builders import build_graph
from sana_export.manifest import Options

Configs = Mapping[str, Mapping[str, Any]]
#: `SanaPipeline` pads the text tokens of a prompt to this many.
TEXT_TOKENS = 300


class MetaWeights(Mapping[str, Tensor]):
    """Name to tensor on the meta device, in place of a checkpoint's weights if only shapes matter."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def on_meta(self) -> MetaWeights:
        """As `CheckpointWeights.on_meta`: itself."""
        return self


class MetaCheckpoint:
    """A stand-in for a checkpoint in `build_graph`, made from the configs of "transformer", "vae" and "text_encoder"."""

    def __init__(self, configs: Configs) -> None:
        self.configs, self.controlnet = configs, None

    def config(self, component: str) -> dict[str, Any]:
        return dict(read_part(component, self.configs[component]).config)

    def weights(self, component: str) -> MetaWeights:
        return MetaWeights(expected_shapes(component, self.configs[component]))


def restated_work(configs: Configs, options: Options) -> GraphWork:
    """A function that counts the work of a deployment graph of a checkpoint with these configs."""
    checkpoint = cast(SanaCheckpoint, MetaCheckpoint(configs))

    @cache
    def module(name: str) -> nn.Module:
        return build_graph(name, checkpoint, options)

    def work(name: str, sizes: Mapping[str, int]) -> Work:
        spec = graph_spec(name, checkpoint, options)
        with torch.device("meta"):
            inputs = {
                tensor.name: torch.empty(
                    [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape], dtype=getattr(torch, tensor.dtype)
                )
                for tensor in spec.inputs
            }
            return torch_work(lambda: module(name)(**inputs))

    return work


def reference_work(configs: Configs, shape: CallShape, dtypes: Mapping[str, str]) -> dict[str, Work]:
    """Stage to the work of diffusers' modules in one call of `shape`. `dtypes` has the dtype of each model.

    The text encoder runs on padded tokens, and the transformer projects the padded text in every step. Perturbed attention counts
    as plain attention.
    """
    from diffusers import SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    config = {name: dict(content) for name, content in configs.items()}
    dtype = {name: getattr(torch, name_of) for name, name_of in dtypes.items()}
    rows = shape.branches * shape.batch
    channels = config["transformer"]["in_channels"]
    size = (shape.latent_height, shape.latent_width)
    with torch.device("meta"):
        encoder = _cast(Gemma2Model(Gemma2Config.from_dict(config["text_encoder"])), dtype["text_encoder"])
        transformer = _cast(SanaTransformer2DModel.from_config(config["transformer"]), dtype["transformer"])

        def encode(tokens: int) -> Work:
            ids = torch.empty(1, tokens, dtype=torch.long)
            return torch_work(lambda: encoder(ids, attention_mask=torch.ones_like(ids), use_cache=False))

        def step() -> Any:
            latents = torch.empty(rows, channels, *size, dtype=dtype["transformer"])
            text = torch.empty(rows, TEXT_TOKENS, config["transformer"]["caption_channels"], dtype=dtype["transformer"])
            guidance = torch.empty(rows) if config["transformer"]["guidance_embeds"] else None
            mask = torch.empty(rows, TEXT_TOKENS)
            return transformer(latents, text, torch.empty(rows), guidance, encoder_attention_mask=mask)

        return with_totals(
            {
                "text_encoder": sum(map(encode, shape.padded_runs), Work()),
                "denoise_step": torch_work(step),
                "vae_decoder": reference_decoder_work(config["vae"], (shape.batch, *size), dtype["vae"]),
            },
            shape.steps,
        )


def reference_decoder_work(config: Mapping[str, Any], shape: tuple[int, int, int], dtype: torch.dtype) -> Work:
    """The work of diffusers' decoder for latents of `shape` (images, height, width)."""
    from diffusers import AutoencoderDC

    batch, *size = shape
    with torch.device("meta"):
        vae = _cast(AutoencoderDC.from_config(dict(config)), dtype)
        return torch_work(lambda: vae.decode(torch.empty(batch, vae.config.latent_channels, *size, dtype=dtype)))


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """`model` in `dtype`. The models' own `to` would warn about modules to keep in float32, which these models do not have."""
    return nn.Module.to(model, dtype)
