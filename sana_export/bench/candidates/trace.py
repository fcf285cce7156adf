"""A plain export: diffusers' modules traced as they are, at fixed shapes, and run by ONNX Runtime inside diffusers' loop.

It separates the speed that comes from ONNX Runtime from the speed that comes from the restated graphs. The text encoder runs on the
padded instruction, the transformer on 300 padded text tokens, and every step projects them again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from sana_export.bench.candidates.eager import PipelineCandidate, load_pipeline, open_job
from sana_export.bench.candidates.table import Job
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.vae_config import read_decoder
from sana_export.environment import cache_folder
from sana_export.errors import UsageError
from sana_export.verify.reference import REFERENCES

TEXT_TOKENS = 300
PARTS = ("text_encoder", "transformer", "vae")


def prepare(job: Job) -> None:
    """Export the three modules into the cache if they are not there yet."""
    folder = trace_folder(job)
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        export(job, Path(unfinished) / folder.name)
        (Path(unfinished) / folder.name).rename(folder)


def load(job: Job) -> PipelineCandidate:
    """diffusers' pipeline without weights. ONNX Runtime computes the calls of its three modules."""
    import onnxruntime
    import torch

    torch.set_num_threads(job.threads)
    runs = {}
    for part in PARTS:
        path = trace_folder(job) / f"{part}.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        runs[part] = _runner(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
    pipeline = _empty_pipeline(open_job(job))
    pipeline.text_encoder.forward = lambda ids, attention_mask: (runs["text_encoder"](ids, attention_mask),)
    pipeline.vae.decode = lambda latents, return_dict: (runs["vae"](latents),)

    def transformer(
        latents: Any,
        *,
        encoder_hidden_states: Any,
        encoder_attention_mask: Any,
        timestep: Any,
        guidance: Any = None,
        **_: Any,
    ) -> Any:
        tensors = [latents, encoder_hidden_states, encoder_attention_mask, timestep.float()]
        return (runs["transformer"](*tensors, *([] if guidance is None else [guidance])),)

    pipeline.transformer.forward = transformer
    return PipelineCandidate(job, pipeline, "traced as it is, float32, onnxruntime on the cpu", "fp32")


def trace_folder(job: Job) -> Path:
    """The folder of the job's traces, named by a hash of the checkpoint, the shapes, the clamp, the exporter and this file."""
    work = job.workload
    if work.pag_scale > 0 or work.device != "cpu":
        raise UsageError(
            "the plain trace cannot run this workload",
            found=f"pag_scale {work.pag_scale:g}, device {work.device}",
            wanted="a workload on the CPU without PAG",
            fix="--backend eager",
        )
    checkpoint = open_job(job)
    versions = [metadata.version(name) for name in ("torch", "diffusers", "transformers", "onnxscript")]
    parts = [checkpoint.sha256, _shapes(job), job.clamp, versions, Path(__file__).read_text("utf-8")]
    return cache_folder() / "traces" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def export(job: Job, folder: Path) -> None:
    """Write text_encoder.onnx, transformer.onnx and vae.onnx into the new `folder`."""
    import torch

    class Wrapped(torch.nn.Module):
        """A module whose forward is `function`."""

        def __init__(self, module: torch.nn.Module, function: Callable[..., Any]) -> None:
            super().__init__()
            self.module, self.function = module, function

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.function(*inputs)[0]

    pipeline = load_pipeline(job)
    encoder, transformer, vae = pipeline.text_encoder, pipeline.transformer, pipeline.vae
    (batch, channels, height, width), branches = _shapes(job)
    rows = branches * batch
    ids, mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long), torch.ones(rows, TEXT_TOKENS, dtype=torch.long)
    latents = torch.randn(batch, channels, height, width)
    embeds = torch.randn(rows, TEXT_TOKENS, transformer.config.caption_channels)
    guidance = (torch.ones(rows),) if transformer.config.guidance_embeds else ()
    length = {1: torch.export.Dim.DYNAMIC}  # one trace for the prompt with the instruction and the negative prompt
    calls: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...], Any]] = {
        "text_encoder": (
            Wrapped(encoder, lambda i, m: encoder(i, attention_mask=m, use_cache=False)),
            (ids, ids.clone()),  # the exporter would merge one tensor given twice into one input
            ((length, length),),
        ),
        "transformer": (
            Wrapped(transformer, lambda x, e, m, t, *g: transformer(x, e, t, *g, encoder_attention_mask=m, return_dict=False)),
            (latents.repeat(branches, 1, 1, 1), embeds, mask, torch.ones(rows), *guidance),
            None,
        ),
        "vae": (Wrapped(vae, lambda x: vae.decode(x, return_dict=False)), (latents,), None),
    }
    folder.mkdir()
    for part, (call, inputs, axes) in calls.items():
        path = str(folder / f"{part}.onnx")
        with torch.no_grad():
            torch.onnx.export(call.eval(), inputs, path, dynamo=True, external_data=True, dynamic_shapes=axes, verbose=False)


def _shapes(job: Job) -> tuple[tuple[int, int, int, int], int]:
    """Shape of the latents [B, C, h, w] and the number of guidance branches."""
    work = job.workload
    checkpoint = open_job(job)
    factor = read_decoder(checkpoint.config("vae")).stride
    transformer = checkpoint.config("transformer")
    shape = (work.images_per_prompt, transformer["in_channels"], work.height // factor, work.width // factor)
    return shape, 2 if work.guidance_scale > 1 and not transformer["guidance_embeds"] else 1


def _runner(session: Any) -> Callable[..., Any]:
    """A function that runs `session` on torch tensors and returns its only output."""
    import torch

    names = [tensor.name for tensor in session.get_inputs()]

    def run(*tensors: Any) -> Any:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return run


def _empty_pipeline(checkpoint: SanaCheckpoint) -> Any:
    """The checkpoint's pipeline with modules on the meta device: they have shapes but no weights."""
    import diffusers
    import torch
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = checkpoint.folder
    index = diffusers.DiffusionPipeline.load_config(folder, local_files_only=True)
    plain = getattr(diffusers, REFERENCES[index["_class_name"]][False])
    traced = type(f"Traced{plain.__name__}", (plain,), {"_execution_device": torch.device("cpu")})  # its modules say "meta"
    with torch.device("meta"):
        modules = {
            "text_encoder": AutoModel.from_config(AutoConfig.from_pretrained(folder / "text_encoder"), dtype=torch.float32),
            "transformer": SanaTransformer2DModel.from_config(SanaTransformer2DModel.load_config(folder / "transformer")),
            "vae": AutoencoderDC.from_config(checkpoint.config("vae")),
        }
    pipeline: Any = traced(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        scheduler=getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler"),
        **modules,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
