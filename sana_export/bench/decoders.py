"""Times the decoders of several autoencoders beside each other, in float32 on the CPU: their work, and diffusers' and our time.

A round decodes each size once with every decoder in turn, so that other load on the machine affects all of them alike. Ratios are
taken pair by pair.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.bench.load_meter import LoadMeter
from sana_export.bench.stages import Summary, summarize
from sana_export.bench.work.count import BUNDLE, REFERENCE, Work
from sana_export.bench.work.networks import reference_decoder_work
from sana_export.bench.work.onnx import onnx_work
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.vae_config import read_decoder
from sana_export.errors import UsageError
from sana_export.export.graph_files import export_graphs
from sana_export.export.parity import Parity, compare_tensors
from sana_export.formats.arrays import Array
from sana_export.machine import describe_machine, describe_versions
from sana_export.manifest import Options
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.runtime.backends.onnxruntime import session_options
from sana_export.runtime.backends.torch import cpu_threads
from sana_export.verify.overlays import load_vae

SIDES = (512, 1024)
ROUNDS = 5
GRAPH = "vae_decoder"


@dataclass(frozen=True)
class DecoderTime:
    """One decoder at one size."""

    #: The autoencoder, as the user named it.
    vae: str
    #: Height and width of the image in pixels.
    side: int
    #: `BUNDLE` for our graph in ONNX Runtime, `REFERENCE` for diffusers' module.
    whose: str
    #: The work of one image.
    work: Work
    #: Times of one image in ms, without the first round.
    ms: Summary
    #: The first autoencoder's time divided by this one's, pair by pair, for the same `whose`: above 1 is faster.
    ratio: Summary


@dataclass(frozen=True)
class DecoderReport:
    """The result of `compare_decoders`."""

    #: One for each autoencoder, size and implementation.
    times: tuple[DecoderTime, ...]
    #: Our image against diffusers', for each autoencoder and size.
    parity: tuple[Parity, ...]
    #: Number of CPU threads.
    threads: int
    #: Share of the machine that other processes used meanwhile, or None.
    other_load: float | None
    #: The machine and the versions.
    machine: dict[str, Any]
    versions: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The report, ready for JSON."""
        return {
            "times": [
                {
                    **{key: getattr(row, key) for key in ("vae", "side", "whose")},
                    **{key: vars(getattr(row, key)) for key in ("ms", "ratio")},
                    "flop": row.work.flop,
                    "bytes": row.work.bytes,
                }
                for row in self.times
            ],
            "parity": [row.as_json() for row in self.parity],
            "passed": all(row.passed for row in self.parity),
            **{key: getattr(self, key) for key in ("threads", "other_load", "machine", "versions")},
        }

    def as_text(self) -> str:
        """A table in Markdown, and the parity below."""
        first = self.times[0].vae
        lines = [
            f"| decoder | px | what runs | TFLOP | GB | ms | p10 to p90 | TFLOP/s | faster than {first} (p10 to p90) |",
            "|---|---:|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in self.times:
            what = "diffusers" if row.whose == REFERENCE else "our graph, ONNX Runtime"
            rate, spread = row.work.flop / row.ms.median / 1e9, f"{row.ms.p10:.0f} to {row.ms.p90:.0f}"
            ratio = "" if row.vae == first else f"{row.ratio.median:.2f} ({row.ratio.p10:.2f} to {row.ratio.p90:.2f})"
            lines.append(
                f"| {row.vae} | {row.side} | {what} | {row.work.flop / 1e12:.3f} | {row.work.bytes / 1e9:.2f} "
                f"| {row.ms.median:.0f} | {spread} | {rate:.3f} | {ratio} |"
            )
        load = "not known" if self.other_load is None else f"{self.other_load:.0%}"
        rounds = self.times[0].ms.n
        lines += ["", f"float32 on the CPU, {self.threads} threads, medians of {rounds} rounds; other load {load}", ""]
        lines += [
            f"{'ok' if row.passed else 'FAILED'}  {row.name}: cosine {row.cosine:.9f}, psnr {row.psnr_db:.1f} dB ({row.limit})"
            for row in self.parity
        ]
        return "\n".join(lines)


@dataclass
class _Decoder:
    """One implementation of one decoder while it is timed."""

    vae: str
    whose: str
    #: Latents [1, C, h, w], as the sampler gives them, to the image [1, 3, H, W].
    decode: Callable[[Array], Array]
    #: Image pixels per latent pixel.
    stride: int
    #: The work of one image with latents of this height and width.
    work: Callable[[int], Work]
    #: Side in pixels to the times in ms, of the first round too.
    ms: dict[int, list[float]] = field(default_factory=dict)


def compare_decoders(
    checkpoints: Sequence[SanaCheckpoint],
    *,
    sides: Sequence[int] = SIDES,
    rounds: int = ROUNDS,
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> DecoderReport:
    """Time the decoders of `checkpoints`, which were opened with an autoencoder each (`vae`), on random latents.

    `sides` are heights and widths in pixels. `rounds` are timed after one that is not. `threads` None: as many as PyTorch uses.
    This needs the memory of all decoders at once. Raises UsageError for a side that is not a multiple of a decoder's stride.
    """
    import torch

    for checkpoint in checkpoints:
        _check_sides(checkpoint, sides)
    count = torch.get_num_threads() if threads is None else threads
    total = len(checkpoints) + 1 + rounds
    with tempfile.TemporaryDirectory(prefix="sana-export-decoders-") as scratch, cpu_threads(count):
        decoders: list[_Decoder] = []
        for number, checkpoint in enumerate(checkpoints):
            assert checkpoint.vae is not None
            on_progress(Progress(f"exporting the decoder of {checkpoint.vae.source}", number, total))
            decoders += _load(checkpoint, Path(scratch, str(number)), count)
        inputs = {
            (side, decoder.stride): _latents(checkpoints[0], side // decoder.stride) for side in sides for decoder in decoders
        }
        meter, parity = LoadMeter(lambda: 0.0), list[Parity]()
        for number in range(1 + rounds):
            on_progress(Progress("first round" if number == 0 else f"round {number}", len(checkpoints) + number, total))
            for side in sides:
                images = [_timed(decoder, side, inputs[side, decoder.stride]) for decoder in decoders]
                if number == 0:
                    pairs = zip(decoders[::2], images[::2], images[1::2], strict=True)
                    parity += [compare_tensors(f"{one.vae} at {side} px", ours, theirs, "fp32") for one, ours, theirs in pairs]
        load = meter.other_load()
        times = [_summary(decoder, decoders[index % 2], side) for side in sides for index, decoder in enumerate(decoders)]
    on_progress(Progress("done", total, total))
    return DecoderReport(tuple(times), tuple(parity), count, load, describe_machine(), describe_versions())


def _load(checkpoint: SanaCheckpoint, folder: Path, threads: int) -> list[_Decoder]:
    """Our graph, exported to `folder`, and diffusers' module."""
    import onnxruntime
    import torch

    vae = checkpoint.vae
    assert vae is not None
    entry = export_graphs(GRAPH, [GRAPH], checkpoint, Options("fp32", clamp=False), folder)[GRAPH]
    path, stride = folder / entry.onnx.path, read_decoder(checkpoint.config("vae")).stride
    session = onnxruntime.InferenceSession(path, session_options(onnxruntime, threads), providers=["CPUExecutionProvider"])
    network = load_vae(vae, torch.float32).eval()
    network.encoder = torch.nn.Identity()

    def ours(latents: Array) -> Array:
        image: Array = session.run(None, {"latents": latents})[0]
        return image

    def theirs(latents: Array) -> Array:
        with torch.inference_mode():
            image: Array = network.decode(torch.from_numpy(latents) / network.config.scaling_factor).sample.numpy()
        return image

    def our_work(side: int) -> Work:
        return onnx_work(path, {"batch": 1, "latent_height": side, "latent_width": side})

    def their_work(side: int) -> Work:
        return reference_decoder_work(checkpoint.config("vae"), (1, side, side), torch.float32)

    return [
        _Decoder(vae.source, BUNDLE, ours, stride, our_work),
        _Decoder(vae.source, REFERENCE, theirs, stride, their_work),
    ]


def _timed(decoder: _Decoder, side: int, latents: Array) -> Array:
    started = time.perf_counter()
    image = decoder.decode(latents)
    decoder.ms.setdefault(side, []).append(1e3 * (time.perf_counter() - started))
    return image


def _summary(decoder: _Decoder, first: _Decoder, side: int) -> DecoderTime:
    own, other = decoder.ms[side][1:], first.ms[side][1:]
    ms, ratio = summarize(own), summarize(theirs / ours for theirs, ours in zip(other, own, strict=True))
    assert ms is not None
    assert ratio is not None
    return DecoderTime(decoder.vae, side, decoder.whose, decoder.work(side // decoder.stride), ms, ratio)


def _latents(checkpoint: SanaCheckpoint, side: int) -> Array:
    shape = (1, checkpoint.config("transformer")["in_channels"], side, side)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _check_sides(checkpoint: SanaCheckpoint, sides: Sequence[int]) -> None:
    stride = read_decoder(checkpoint.config("vae")).stride
    if wrong := [side for side in sides if side % stride]:
        raise UsageError(
            "a side does not fit the decoder",
            found=f"{wrong[0]} px with {checkpoint.vae and checkpoint.vae.source}",
            wanted=f"a multiple of {stride}",
            fix=f"--sides {max(stride, round(wrong[0] / stride) * stride)}",
        )
