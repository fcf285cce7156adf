"""Eager diffusers beside a bundle on the demo page. Imports PyTorch when it first draws."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.adapters import Lora
from sana_export.cli.packages import require
from sana_export.cli.terminal.progress_bars import without_progress_bars
from sana_export.cli.verb import add_model_options, model_options
from sana_export.commands import model_words
from sana_export.manifest import Checkpoint, Manifest
from sana_export.runtime.callbacks import IsCancelled, check_cancelled
from sana_export.runtime.request import Request
from sana_export.serve.demo.studio import Painting

if TYPE_CHECKING:
    from sana_export.bench.candidates.eager import TimedPipeline
    from sana_export.checkpoint.checkpoint import SanaCheckpoint


class EagerReference:
    """diffusers' pipeline of a bundle's checkpoint, in the dtypes that `bench` times, on a GPU if PyTorch finds one."""

    def __init__(self, checkpoint: SanaCheckpoint, manifest: Manifest) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self._key: object = None
        self._pipeline: TimedPipeline | None = None
        self._cancelled: IsCancelled | None = None

    @classmethod
    def open(cls, bundle: Path, model: str, options: argparse.Namespace) -> EagerReference:
        """The checkpoint `model` with the weights that the manifest of `bundle` names besides it.

        Raises DependencyError if PyTorch or diffusers is missing, and UsageError if the bundle is of another checkpoint.
        """
        require("", "export")
        from sana_export.checkpoint.checkpoint import open_checkpoint
        from sana_export.verify.bundle import check_origin

        manifest = Manifest.load(bundle)
        checkpoint = open_checkpoint(model, **_opening(manifest.checkpoint, options))
        check_origin(bundle, manifest, checkpoint, "demo")
        return cls(checkpoint, manifest)

    def draw(self, request: Request, seed: int, loras: Sequence[Lora], cancelled: IsCancelled) -> Painting:
        """Draw one image, with `loras` on top of those in the bundle. Raises Cancelled at the next step."""
        self._cancelled = cancelled
        pipeline = self._loaded(request.pag_scale > 0, tuple(loras))
        drawn = pipeline.draw(request, seed)
        stages = {
            "text encoder": sum(drawn.times["text_encoder"]),
            f"{len(drawn.times['denoise_step'])} steps": sum(drawn.times["denoise_loop"]),
            "decoder": sum(drawn.times["vae_decoder"]),
        }
        title = f"{type(pipeline.pipeline).__name__}, eager on {pipeline.pipeline.device.type}"
        seconds = {stage: milliseconds / 1000 for stage, milliseconds in stages.items()}
        return Painting(drawn.images[0], title, seed, seconds, {}, reference=True)

    def _loaded(self, pag: bool, loras: tuple[Lora, ...]) -> TimedPipeline:
        """The pipeline for these LoRAs. Only the last one is kept."""
        import torch

        from sana_export.bench.candidates.eager import TimedPipeline, recommended_dtypes
        from sana_export.verify.reference import load_reference

        if self._pipeline is None or self._key != (pag, loras):
            self._pipeline = None
            checkpoint = replace(self.checkpoint, loras=(*self.checkpoint.loras, *loras))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtypes = recommended_dtypes(checkpoint, device)
            with without_progress_bars():
                pipeline = load_reference(checkpoint, self.manifest.options, pag=pag, dtypes=dtypes).to(device)
            self._pipeline, self._key = TimedPipeline(pipeline, device, self._check), (pag, loras)
        return self._pipeline

    def _check(self) -> None:
        check_cancelled(self._cancelled)


def _opening(checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `open_checkpoint` for the files and the overlays of a recorded checkpoint."""
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    recorded = parser.parse_args(model_words(checkpoint)[1:])
    return model_options(recorded, options)
