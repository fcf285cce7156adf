"""Runs a folder in optimum's layout with one ONNX Runtime session for each component, behind diffusers' own pipeline classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import torch
import transformers
from torch import Tensor

from sana_export.environment import import_digest
from tests.support.bundles import made_once


def layout_in(folder: Path) -> Path:
    """The float32 layout of `tiny-random`, exported to `folder` unless it is there."""

    def export(own: Path) -> None:
        from sana_export.checkpoint.checkpoint import open_checkpoint
        from sana_export.export.component_layout import export_components

        export_components(open_checkpoint("tiny-random"), own, precision="fp32")

    return made_once(folder / f"tiny-fp32-components-{import_digest('sana_export.export.component_layout')[:16]}", export)


class OnnxComponent:
    """One folder of a layout, called with torch tensors by name."""

    dtype = torch.float32

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.config = SimpleNamespace(**json.loads((folder / "config.json").read_text("utf-8")))

    def run(self, **inputs: Tensor) -> Tensor:
        kinds = {value.name: np.int64 if value.type == "tensor(int64)" else np.float32 for value in self.session.get_inputs()}
        feeds = {name: inputs[name].numpy().astype(kind) for name, kind in kinds.items()}
        return torch.from_numpy(self.session.run(None, feeds)[0])


class TextEncoder(OnnxComponent):
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.run(input_ids=input_ids, attention_mask=attention_mask),)


class Transformer(OnnxComponent):
    def __call__(self, hidden_states: Tensor, *, return_dict: bool = False, attention_kwargs: Any = None, **inputs: Tensor) -> Any:
        return (self.run(hidden_states=hidden_states, **inputs),)


class Vae(OnnxComponent):
    """The decoder."""

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.run(latent_sample=latents),)


def load_pipeline(layout: Path) -> Any:
    """diffusers' pipeline of the class that the layout names, with nothing but the layout's files."""
    index = json.loads((layout / "model_index.json").read_text("utf-8"))
    pipeline = getattr(diffusers, index["_class_name"])(
        tokenizer=getattr(transformers, index["tokenizer"][1]).from_pretrained(layout / "tokenizer"),
        text_encoder=TextEncoder(layout / "text_encoder"),
        vae=Vae(layout / "vae_decoder"),
        transformer=Transformer(layout / "transformer"),
        scheduler=getattr(diffusers, index["scheduler"][1]).from_pretrained(layout / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
