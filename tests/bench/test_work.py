"""Counted work: ONNX files against PyTorch's own counter, configs against ONNX files, sizes against real calls."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sana_export.bench.work.call_shape import call_shape, stage_work
from sana_export.bench.work.count import BUNDLE, REFERENCE, Achieved, Product, Rates, Work
from sana_export.bench.work.networks import restated_work
from sana_export.bench.work.onnx import onnx_products, onnx_work
from sana_export.bench.work.torch import torch_work
from sana_export.bench.work.workload import workload_work
from sana_export.bench.workload import Workload
from sana_export.contract import DYNAMIC_AXES
from sana_export.errors import ArtifactError
from sana_export.export.example_inputs import CHECK_SIZES, TRACE_SIZES, Sizes, graph_spec, random_inputs
from sana_export.graphs.builders import build_graph
from sana_export.manifest import Manifest
from sana_export.runtime.pipeline import SanaRuntime

GRAPHS = ("text_encoder", "context", "denoiser", "sampler", "vae_decoder", "vae_decoder_head", "vae_decoder_tail", "postprocess")
WORK = Workload("test", 96, 128, 2, 4.5, ("a cute 🐼", "一只可爱的熊猫"), images_per_prompt=2)
#: 4 FLOP and 2 bytes per second, so that times are easy to compute.
SLOW = Rates(4.0, 2.0, "fp32", "made up")


def axes(sizes: Sizes) -> dict[str, int]:
    return {axis: sizes.of(axis) for axis in DYNAMIC_AXES if not axis.startswith("tile_image")}


def file_of(bundle: Path, manifest: Manifest, graph: str) -> Path:
    return bundle / manifest.graphs[graph].files[0].path


def test_a_product_takes_the_longer_of_its_two_times() -> None:
    work = Work.of([Product("a", "MatMul", 40, 2), Product("b", "Conv", 4, 10), Product("b", "Conv", 4, 10)])
    assert (work.flop, work.bytes) == (48, 22)
    assert work.floor_seconds(SLOW) == pytest.approx(40 / 4 + 2 * 10 / 2)
    assert (work * 3).floor_seconds(SLOW) == pytest.approx(3 * work.floor_seconds(SLOW))
    assert work + Work() == work
    achieved = Achieved.of(work, SLOW, milliseconds=40_000)
    assert dataclasses.astuple(achieved) == pytest.approx((48 / 40 / 1e12, 22 / 40 / 1e9, 20_000, 0.5))


@pytest.mark.parametrize("sizes", [TRACE_SIZES, CHECK_SIZES], ids=["traced sizes", "other sizes"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_onnx_files_count_as_torch_counts(graph: str, sizes: Sizes, tiny_bundle: Path, tiny_checkpoint: Any) -> None:
    """FLOP equal PyTorch's FlopCounterMode; products and bytes equal those of the tensors that its operators use."""
    manifest = Manifest.load(tiny_bundle)
    found = onnx_work(file_of(tiny_bundle, manifest, graph), axes(sizes))
    module = build_graph(graph, tiny_checkpoint, manifest.options)
    inputs = random_inputs(graph_spec(graph, tiny_checkpoint, manifest.options), sizes, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    assert found.flop == counter.get_total_flops()
    assert (found.flop > 0) is (graph not in ("sampler", "postprocess"))
    assert found == torch_work(lambda: module(**inputs))


def test_configs_alone_count_as_the_files_do(tiny_bundle: Path, tiny_checkpoint: Any) -> None:
    """With two images per call. With one, PyTorch expands an axis of one operand that the ONNX file writes out."""
    manifest = Manifest.load(tiny_bundle)
    configs = {name: tiny_checkpoint.config(name) for name in ("transformer", "vae", "text_encoder")}
    shape = call_shape(tiny_bundle, manifest, WORK, WORK.prompts[0])
    ours = stage_work(shape, lambda name, sizes: onnx_work(file_of(tiny_bundle, manifest, name), sizes))
    assert stage_work(shape, restated_work(configs, manifest.options)) == ours
    assert ours["denoise_loop"].flop == 2 * ours["denoise_step"].flop
    parts = ("text_encoder", "context", "denoise_loop", "vae_decoder")
    assert ours["end_to_end"].bytes == sum(ours[stage].bytes for stage in parts)


def test_a_workload_counts_every_prompt(tiny_bundle: Path, tiny_checkpoint: Any) -> None:
    manifest = Manifest.load(tiny_bundle)
    both = workload_work(tiny_bundle, manifest, tiny_checkpoint, WORK)
    each = [
        workload_work(tiny_bundle, manifest, tiny_checkpoint, dataclasses.replace(WORK, prompts=(prompt,)))
        for prompt in WORK.prompts
    ]
    for whose in (BUNDLE, REFERENCE):
        assert {stage: work.flop for stage, work in both[whose].items()} == {
            stage: each[0][whose][stage].flop + each[1][whose][stage].flop for stage in both[whose]
        }
    assert both[REFERENCE]["end_to_end"].flop > both[BUNDLE]["end_to_end"].flop
    assert "context" not in both[REFERENCE]


@pytest.mark.parametrize("tile", [0, 64], ids=["one piece", "tiles"])
def test_sizes_are_those_of_a_real_call(tile: int, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that every graph gets when the runtime draws the prompt."""
    monkeypatch.setattr("sana_export.bench.workload.Workload.sampling", lambda work: {**sampling(work), "decoder_tile": tile})
    manifest = Manifest.load(tiny_bundle)
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")
    runtime.sessions.require(("vae_decoder", "vae_decoder_head", "vae_decoder_tail"))
    seen: dict[str, list[dict[str, tuple[int, ...]]]] = {}
    for name, session in list(runtime.sessions.items()):
        runtime.sessions[name] = RecordingSession(session, seen.setdefault(name, []))
    prompt = WORK.prompts[1]
    runtime(prompt, seed=0, **WORK.sampling())
    shape = call_shape(tiny_bundle, manifest, WORK, prompt)
    assert [feeds["latents"] for feeds in seen["denoiser"]] == [
        (shape.batch, 32, shape.latent_height, shape.latent_width)
    ] * shape.steps

    def padded(tokens: int) -> int:
        """What the backend runs. The work is that of the tokens which count."""
        return -(-tokens // runtime.backend.text_multiple) * runtime.backend.text_multiple

    assert seen["context"][0]["prompt_embeds"][:3] == (shape.branches, shape.batch, padded(shape.text_tokens))
    runs = [(*feeds["inputs_embeds"][:2], feeds["prefix"][3]) for feeds in seen["text_encoder"]]
    assert runs == [(prompts, padded(tokens), prefix) for prompts, tokens, prefix in shape.encoder_runs]
    tiles = [(feeds["row_index"][0], feeds["column_index"][0]) for feeds in seen["vae_decoder_tail"]]
    assert tiles == [*shape.windows] * shape.batch  # image by image
    assert (len(tiles) > 1) is bool(tile)
    if tile:
        assert seen["vae_decoder_tail"][0]["features"][2:] == shape.features


def sampling(work: Workload) -> dict[str, Any]:
    names = ("num_inference_steps", "guidance_scale", "pag_scale", "height", "width")
    same = {name: getattr(work, name) for name in names}
    return {**same, "num_images_per_prompt": work.images_per_prompt, "use_resolution_binning": False}


class RecordingSession:
    """A session that records the shapes of its inputs."""

    def __init__(self, session: Any, seen: list[dict[str, tuple[int, ...]]]) -> None:
        self.session, self.seen = session, seen

    def run(self, feeds: dict[str, Any]) -> Any:
        self.seen.append({name: tuple(v.shape if isinstance(v, np.ndarray) else v.shape()) for name, v in feeds.items()})
        return self.session.run(feeds)


def test_a_missing_size_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        onnx_products(file_of(tiny_bundle, Manifest.load(tiny_bundle), "denoiser"), {"batch": 1, "branches": 2})
    assert error.value.found == "no size of latent_height"
