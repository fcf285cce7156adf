"""A bundle with a ControlNet, and diffusers' pipelines with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sana_export.manifest import Manifest
from tests.support.bundles import PAG_LAYER, exported, made_once

ALIAS = "tiny-random-controlnet"


def with_controlnet(checkpoint: Any, bundle: Path, folder: Path) -> Path:
    """A copy in `folder` of `bundle`, which has the graphs of the group img2img, with the ControlNet of `checkpoint`."""
    graphs = exported(checkpoint, folder / "tiny-controlnet", graphs=["denoiser", "control"], pag_layers=[PAG_LAYER])

    def make(own: Path) -> None:
        shutil.copytree(bundle, own)
        shutil.copytree(graphs / "onnx", own / "onnx", dirs_exist_ok=True)
        plain, controlled = Manifest.load(bundle), Manifest.load(graphs)
        replace(plain, checkpoint=controlled.checkpoint, graphs={**plain.graphs, **controlled.graphs}).save(own)

    return made_once(folder / f"{bundle.name}-controlnet", make)


@contextmanager
def controlled(pipeline: Any, controlnet: Any, control: torch.Tensor, scale: float) -> Iterator[None]:
    """Within the block, the transformer of `pipeline` gets the residuals of `controlnet` in every call.

    `control` [1, C, h, w] are the latents of the control image. This is for pipelines that have no ControlNet in diffusers.
    """
    forward = pipeline.transformer.forward

    def run(hidden_states: torch.Tensor, **arguments: Any) -> Any:
        names = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
        residuals = controlnet(
            hidden_states,
            controlnet_cond=control.expand(len(hidden_states), -1, -1, -1),
            conditioning_scale=scale,
            **{name: arguments[name] for name in names},
        ).controlnet_block_samples
        return forward(hidden_states, controlnet_block_samples=tuple(residuals), **arguments)

    pipeline.transformer.forward = run
    try:
        yield
    finally:
        del pipeline.transformer.forward
