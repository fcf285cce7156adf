"""diffusers' Sana pipelines, one of each class, and a bundle for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sana_export.runtime import SanaRuntime


@dataclass(frozen=True)
class Case:
    """A pipeline of diffusers, and the runtime of its bundle."""

    pipe: Any
    runtime: SanaRuntime
    #: Words of a call that the pipeline needs.
    words: dict[str, Any]


@pytest.fixture(scope="session")
def image() -> Any:
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((230, 150), Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def controlnet_runtime(controlnet_bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(controlnet_bundle, backend="onnxruntime")


@pytest.fixture(scope="session")
def cases(
    tiny_pipeline: Any,
    sprint_pipeline: Any,
    controlnet_checkpoint: Any,
    tiny_runtime: SanaRuntime,
    sprint_runtime: SanaRuntime,
    sprint_img2img_runtime: SanaRuntime,
    controlnet_runtime: SanaRuntime,
    image: Any,
) -> dict[str, Case]:
    """By the class of the pipeline."""
    import diffusers
    import torch

    from sana_export.verify.overlays import load_controlnet
    from tests.support.bundles import PAG_LAYER

    parts, sprint_parts = tiny_pipeline.components, sprint_pipeline.components
    layer = PAG_LAYER.replace(".", r"\.") + r"\.attn1$"
    sprint = {"num_inference_steps": 2}
    found = {
        "SanaPipeline": Case(diffusers.SanaPipeline(**parts), tiny_runtime, {}),
        "SanaPAGPipeline": Case(diffusers.SanaPAGPipeline(**parts, pag_applied_layers=layer), tiny_runtime, {}),
        "SanaSprintPipeline": Case(diffusers.SanaSprintPipeline(**sprint_parts), sprint_runtime, sprint),
        "SanaSprintImg2ImgPipeline": Case(
            diffusers.SanaSprintImg2ImgPipeline(**sprint_parts), sprint_img2img_runtime, {**sprint, "image": image}
        ),
        "SanaControlNetPipeline": Case(
            diffusers.SanaControlNetPipeline(**parts, controlnet=load_controlnet(controlnet_checkpoint, torch.float32)),
            controlnet_runtime,
            {"control_image": image},
        ),
    }
    for case in found.values():
        case.pipe.set_progress_bar_config(disable=True)
    return found
