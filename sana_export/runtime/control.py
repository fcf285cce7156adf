"""Control images: what a ControlNet reads in every step, and what it adds to the denoiser.

Source: diffusers `SanaControlNetPipeline`. The control image goes through the autoencoder's encoder like an image to start from.
Perturbed attention has no pipeline with a ControlNet there. As in diffusers' pipelines of other models, the ControlNet runs
unperturbed, and a perturbed branch gets the residuals of the branch it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sana_export.contract import GRAPH_GROUPS, RESIDUALS
from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Float32
from sana_export.manifest import Manifest
from sana_export.runtime.backends.base import DeviceTensor
from sana_export.runtime.guidance import Branches
from sana_export.runtime.images import GivenImage, distinct, encoder_graphs, image_for_each, prepared_image, warn_about_shape

#: The graphs of a ControlNet.
CONTROLNET_GRAPHS = GRAPH_GROUPS["control"]
#: Limits of a ControlNet, so that a damaged manifest does not take all memory.
MOST_LAYERS, MOST_CHANNELS = 1_000, 1 << 16
#: The default of `SanaControlNetPipeline`.
CONDITIONING_SCALE = 1.0


@dataclass(frozen=True, eq=False)
class ControlImages:
    """The control images of a plan with B drawn images."""

    #: float32 [1, 3, H, W] each: the given images that are used, as the encoder reads them.
    images: tuple[Float32, ...]
    #: The number of each drawn image's own control image in `images`: B numbers.
    sources: tuple[int, ...]
    #: float32 [1]: the factor on the residuals.
    scale: Float32
    #: Side in image pixels of the tiles that images are encoded in; 0 for one piece.
    tile: int

    @property
    def encoder_graphs(self) -> tuple[str, ...]:
        """The graphs that encode the images."""
        return encoder_graphs(self.tile)


@dataclass(frozen=True, eq=False)
class ControlConditioning:
    """What a ControlNet reads in every step, on the device."""

    #: Its cross-attention keys and values of all branches with a prompt of their own.
    context: DeviceTensor
    #: The same without the negative prompts, if some steps run without them, as others do with them.
    unguided: DeviceTensor | None
    #: float32 [B, C, h, w]: the encoded control images.
    latents: DeviceTensor
    #: Their shape.
    shape: tuple[int, ...]

    def of(self, branches: Branches, count: int) -> DeviceTensor:
        """The context for steps with these branches, if the plan has `count` branches with a prompt of their own."""
        return self.unguided if self.unguided is not None and len(branches.texts) < count else self.context


def plan_control(
    images: Sequence[GivenImage],
    scale: float,
    *,
    prompts: int,
    per_prompt: int,
    size: tuple[int, int],
    output_size: tuple[int, int],
    tile: int,
) -> ControlImages:
    """The control images of a plan that samples at `size` (height, width).

    Raises UsageError if the number of images does not fit the prompts.
    """
    sources = image_for_each("control_image", len(images), prompts, per_prompt)
    used = distinct(sources)
    for number in used:
        warn_about_shape(images[number], *output_size)
    prepared = tuple(prepared_image(images[number], *size) for number in used)
    return ControlImages(prepared, tuple(used.index(number) for number in sources), np.array([scale], np.float32), tile)


def residuals_shape(manifest: Manifest, latents: Sequence[int], branches: Branches) -> tuple[int, ...] | None:
    """The shape of the denoiser's input `residuals` (contract.RESIDUALS) for latents of the shape `latents` and these branches.

    None if it has no such input.
    """
    spec = next((tensor for tensor in manifest.graphs["denoiser"].spec.inputs if tensor.name == "residuals"), None)
    if spec is None:
        return None
    layers, channels = (spec.shape[0], spec.shape[-1]) if len(spec.shape) == len(RESIDUALS) else (0, 0)
    if not (isinstance(layers, int) and isinstance(channels, int) and 0 < layers <= MOST_LAYERS and 0 < channels <= MOST_CHANNELS):
        raise ArtifactError(
            "the manifest describes another denoiser than ours",
            found=f"residuals {list(spec.shape)}",
            wanted="the shape " + ", ".join(map(str, RESIDUALS[1:-1])) + " between numbers of layers and channels",
        )
    batch, _, height, width = latents
    return layers, len(branches.texts), batch, height, width, channels
