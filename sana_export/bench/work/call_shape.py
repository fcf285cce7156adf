"""The sizes of everything that one call runs, and the work of its stages that follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sana_export.bench.stages import END_TO_END
from sana_export.bench.work.count import Work
from sana_export.bench.workload import Workload
from sana_export.formats.arrays import Float32
from sana_export.manifest import Manifest
from sana_export.runtime.decoding import Window, plan_windows
from sana_export.runtime.plan import make_plan
from sana_export.runtime.prompt import PromptEncoder
from sana_export.runtime.request import Request

#: A function that returns the work of a graph, given its name and the sizes of its dynamic axes.
GraphWork = Callable[[str, Mapping[str, int]], Work]


@dataclass(frozen=True)
class CallShape:
    """The sizes of one call."""

    #: Number of images.
    batch: int
    #: Number of guidance branches.
    branches: int
    #: Number of guidance branches with a prompt of their own.
    text_branches: int
    #: Number of steps.
    steps: int
    #: Height of the latents.
    latent_height: int
    #: Width of the latents.
    latent_width: int
    #: [rows, tokens, prefix tokens] of each run of the text encoder.
    encoder_runs: tuple[tuple[int, int, int], ...]
    #: Text tokens that the denoiser attends to.
    text_tokens: int
    #: Tokens of each run of the text encoder in diffusers, which pads them.
    padded_runs: tuple[int, ...]
    #: Height and width of the decoder's features. [0, 0] if it decodes in one piece.
    features: tuple[int, int] = (0, 0)
    #: [rows, columns] of each tile in features. Empty if it decodes in one piece.
    windows: tuple[tuple[int, int], ...] = ()


def call_shape(bundle: Path, manifest: Manifest, work: Workload, prompt: str) -> CallShape:
    """The sizes that the runtime uses if it samples one prompt of `work` with `bundle`."""
    plan = make_plan(Request(prompt=prompt, **work.sampling()), bundle, manifest)
    text = PromptEncoder.load(bundle, manifest)
    tokens = text.tokenize_plan(plan.texts, plan.max_sequence_length)
    runs: list[tuple[int, int, int]] = []

    def record(embeds: Float32, prefix: Float32) -> Float32:
        runs.append((embeds.shape[0], embeds.shape[1], prefix.shape[3]))
        return np.zeros_like(embeds)

    embeddings = text.encode(tokens, record)
    batch, _, height, width = plan.latents_shape
    model, features = manifest.model, (0, 0)
    windows: tuple[Window, ...] = ()
    if plan.decoder_tile:
        scale = model.decoder_tile_scale
        features = (height * model.vae_scale_factor // scale, width * model.vae_scale_factor // scale)
        windows = plan_windows(*features, plan.decoder_tile // scale, model.decoder_tile_halo)
    instruction = len(text.instruction.token_ids)
    return CallShape(
        batch,
        len(plan.branches.names),
        len(plan.branches.texts),
        len(plan.schedule.timesteps),
        height,
        width,
        tuple(runs),
        embeddings.shape[2],
        padded_runs(instruction, plan.max_sequence_length, negative=any(not instruct for _, instruct in plan.texts)),
        features,
        tuple((len(window.rows.index), len(window.columns.index)) for window in windows),
    )


def padded_runs(instruction: int, length: int, *, negative: bool) -> tuple[int, ...]:
    """Tokens of the text encoder's runs in diffusers: the prompt after the instruction, and the negative prompt without it."""
    return (instruction + length - 2, *([length] if negative else []))


def stage_work(shape: CallShape, graph_work: GraphWork) -> dict[str, Work]:
    """Stage to the work of the deployment graphs in one call of `shape`."""
    text = {"branches": shape.branches, "text_branches": shape.text_branches, "text_tokens": shape.text_tokens}
    step = graph_work("denoiser", {**_latents(shape), **text})
    runs = [
        graph_work("text_encoder", {"batch": rows, "tokens": tokens, "prefix_tokens": prefix})
        for rows, tokens, prefix in shape.encoder_runs
    ]
    return with_totals(
        {
            "text_encoder": sum(runs, Work()),
            "context": graph_work("context", {"batch": shape.batch, **text}),
            "denoise_step": step,
            "vae_decoder": decoder_work(shape, graph_work),
        },
        shape.steps,
    )


def decoder_work(shape: CallShape, graph_work: GraphWork) -> Work:
    """The work of the decoder's graphs in one call of `shape`."""
    if not shape.windows:
        return graph_work("vae_decoder", _latents(shape))
    height, width = shape.features
    features = {"batch": shape.batch, "feature_height": height, "feature_width": width}
    sizes = Counter(shape.windows)  # few sizes, and each takes time to count
    tiles = (graph_work("vae_decoder_tail", {**features, "tile_height": h, "tile_width": w}) * n for (h, w), n in sizes.items())
    return sum(tiles, graph_work("vae_decoder_head", _latents(shape)))


def _latents(shape: CallShape) -> dict[str, int]:
    return {"batch": shape.batch, "latent_height": shape.latent_height, "latent_width": shape.latent_width}


def with_totals(stages: Mapping[str, Work], steps: int) -> dict[str, Work]:
    """`stages` together with the loop of `steps` steps and the whole call."""
    loop = stages["denoise_step"] * steps
    whole = sum((work for stage, work in stages.items() if stage != "denoise_step"), loop)
    return {**stages, "denoise_loop": loop, END_TO_END: whole}
