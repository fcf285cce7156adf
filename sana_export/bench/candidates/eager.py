"""The baseline: diffusers' pipeline, eager, in the dtypes that its documentation recommends, with a clock between the stages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from sana_export.adapters import Lora
from sana_export.bench.candidates.table import Generated, Job
from sana_export.bench.stages import StageTimes
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.vae import Vae
from sana_export.errors import DependencyError
from sana_export.manifest import Options
from sana_export.runtime.request import Request

#: The dtype that the weights are stored in to the transformer's dtype on a GPU. The other models run in bfloat16 there
#: (https://huggingface.co/docs/diffusers/api/pipelines/sana).
GPU_TRANSFORMER = {"F32": "float16", "F16": "float16", "BF16": "bfloat16"}


def load(job: Job) -> PipelineCandidate:
    """diffusers' pipeline of the checkpoint on the workload's device, with PAG if the workload has a PAG scale."""
    import torch

    torch.set_num_threads(job.threads)
    pipeline = load_pipeline(job)
    if job.workload.device == "cpu":
        return PipelineCandidate(job, pipeline, "eager, float32 on the cpu", "fp32")
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    return PipelineCandidate(job, pipeline, f"eager, {dtype} transformer, bfloat16 text encoder and decoder on the gpu", "bf16")


def load_compiled(job: Job) -> PipelineCandidate:
    """The same with its transformer and decoder compiled by `torch.compile`. Raises DependencyError if there is no compiler."""
    import torch

    _check_compiler(job.workload.device)
    torch.set_num_threads(job.threads)
    pipeline = load_pipeline(job)
    on_cpu = job.workload.device == "cpu"
    compiled: dict[str, Any] = {} if on_cpu else {"mode": "max-autotune"}
    pipeline.transformer.forward = torch.compile(pipeline.transformer.forward, **compiled)
    pipeline.vae.decoder.forward = torch.compile(pipeline.vae.decoder.forward, **compiled)
    return PipelineCandidate(
        job, pipeline, f"torch.compile, dtypes as eager, on the {'cpu' if on_cpu else 'gpu'}", "fp32" if on_cpu else "bf16"
    )


def _check_compiler(device: str) -> None:
    """Raise DependencyError if `torch.compile` finds no compiler."""
    if device != "cpu":
        if importlib.util.find_spec("triton") is None:
            raise DependencyError(
                "torch.compile needs Triton on a GPU", found="no module triton", wanted="triton", fix="pip install triton"
            )
        return
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers if name):
        raise DependencyError(
            "torch.compile needs a C++ compiler on a CPU", found="no compiler", wanted="g++", fix="apt-get install g++"
        )


def load_pipeline(job: Job) -> Any:
    """The reference pipeline of the job's checkpoint on the workload's device."""
    from sana_export.verify.reference import load_reference

    options = Options("fp32", job.clamp, tuple(job.pag_layers))
    checkpoint = open_job(job)
    dtypes = recommended_dtypes(checkpoint, job.workload.device)
    return load_reference(checkpoint, options, pag=job.workload.pag_scale > 0, dtypes=dtypes).to(torch_device(job))


def torch_device(job: Job) -> str:
    """PyTorch's name of the device that the job runs on: "cpu", "cuda" or "cuda:1"."""
    if job.workload.device == "cpu" or job.device is None:
        return job.workload.device
    return f"{job.workload.device}:{job.device}"


def open_job(job: Job) -> SanaCheckpoint:
    """The job's checkpoint. The parent has checked it already."""
    return SanaCheckpoint(
        Path(job.checkpoint),
        job.checkpoint,
        weights_variant=job.weights_variant,
        transformer_file=None if job.transformer is None else Path(job.transformer),
        vae=None if job.vae is None else Vae(job.vae, Path(job.vae), job.weights_variant),
        loras=tuple(Lora(Path(path), scale, layer_scales) for path, scale, layer_scales in job.loras),
    )


def recommended_dtypes(checkpoint: SanaCheckpoint, device: str) -> Any:
    """The argument `dtype` of diffusers' `from_pretrained` on "cpu" or "cuda"."""
    import torch

    if device == "cpu":
        return torch.float32
    if not torch.cuda.is_available():
        raise DependencyError(
            "PyTorch finds no GPU",
            found=f"torch {torch.__version__} without one",
            wanted="a CUDA GPU, and PyTorch built for CUDA",
            fix="--workload cpu",
        )
    stored = checkpoint.weights("transformer").dtype()
    return {"transformer": getattr(torch, GPU_TRANSFORMER[stored]), "default": torch.bfloat16}


class TimedPipeline:
    """A diffusers pipeline that records the times at which its components are called.

    on_step: called before each step. What it raises ends the call.
    """

    def __init__(self, pipeline: Any, device: str, on_step: Callable[[], None] = lambda: None) -> None:
        self.pipeline, self._on_step = pipeline, on_step
        self.clock: HostClock | CudaClock = HostClock() if device == "cpu" else CudaClock(device)
        pipeline.encode_prompt = self._timed(pipeline.encode_prompt, before="encode", after="encoded")
        pipeline.transformer.forward = self._timed(pipeline.transformer.forward, before="step")
        pipeline.vae.decode = self._timed(pipeline.vae.decode, before="decode")

    def draw(self, request: Request, seed: int) -> Generated:
        """The images of a request with one seed (`call_reference`), and the times of the stages."""
        import torch

        from sana_export.verify.reference import call_reference

        self.clock.start()
        with torch.inference_mode():
            images = call_reference(self.pipeline, request, seed)
        self.clock.record("done")
        return Generated(images, stage_times(self.clock.read()))

    def _timed(self, function: Callable[..., Any], *, before: str, after: str | None = None) -> Callable[..., Any]:
        """`function`, which records the events `before` and `after` each time it is called."""

        def call(*arguments: Any, **options: Any) -> Any:
            if before == "step":
                self._on_step()
            self.clock.record(before)
            result = function(*arguments, **options)
            if after is not None:
                self.clock.record(after)
            return result

        return call


class PipelineCandidate:
    """A timed pipeline as a backend of the benchmark."""

    def __init__(self, job: Job, pipeline: Any, how: str, precision: str) -> None:
        self.job, self.timed, self.precision = job, TimedPipeline(pipeline, torch_device(job)), precision
        self.description = f"diffusers {type(pipeline).__name__}, {how}"

    def generate(self, prompt: str, seed: int) -> Generated:
        return self.timed.draw(Request(prompt=prompt, **self.job.workload.sampling()), seed)

    def peak_device_bytes(self) -> int | None:
        import torch

        on_gpu = self.job.workload.device == "cuda"
        return int(torch.cuda.max_memory_reserved(torch_device(self.job))) if on_gpu else None


class HostClock:
    """Events on the host's clock, for work that is finished when a call returns."""

    def __init__(self) -> None:
        self._events: list[tuple[str, float]] = []

    def start(self) -> None:
        self._events.clear()

    def record(self, name: str) -> None:
        self._events.append((name, perf_counter()))

    def read(self) -> list[tuple[str, float]]:
        """Names and milliseconds since the first event."""
        return [(name, 1e3 * (moment - self._events[0][1])) for name, moment in self._events]


class CudaClock:
    """Events on the current stream of a GPU. The host does not wait for the GPU before `read`."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._events: list[tuple[str, Any]] = []

    def start(self) -> None:
        self._events.clear()

    def record(self, name: str) -> None:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append((name, event))

    def read(self) -> list[tuple[str, float]]:
        """Names and milliseconds since the first event, after waiting for the last one."""
        self._events[-1][1].synchronize()
        return [(name, self._events[0][1].elapsed_time(event)) for name, event in self._events]


def stage_times(events: Sequence[tuple[str, float]]) -> StageTimes:
    """The stages of one call of a diffusers pipeline, from the times (ms) of its events.

    A step lasts from one call of the transformer to the next, the last step until the decoder is called.
    """
    at = dict(events)
    steps = [moment for name, moment in events if name == "step"] + [at["decode"]]
    return {
        "text_encoder": [at["encoded"] - at["encode"]],
        "denoise_step": [after - before for before, after in pairwise(steps)],
        "denoise_loop": [at["decode"] - steps[0]],
        "vae_decoder": [at["done"] - at["decode"]],
    }
