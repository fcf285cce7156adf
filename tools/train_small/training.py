"""What both trainings share: the state that is saved and resumed, its averaged weights, the learning rate."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

#: Steps over which the learning rate rises from 0.
WARM_UP = 100
SAVE_EVERY = 250
LOG_EVERY = 50
#: Inputs of a weight from which on its learning rate falls.
FAN_IN = 256
#: The averaged weights take this share of themselves at each step, less at the start.
EMA_DECAY = 0.995


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float) -> None:
    """The options of every training."""
    parser.add_argument("--folder", type=Path, required=True, help="folder of checkpoints; a training that is there is resumed")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps in all (default: {steps})")
    parser.add_argument("--batch", type=int, default=batch, help=f"scenes a step (default: {batch})")
    parser.add_argument("--rate", type=float, default=rate, help=f"highest learning rate (default: {rate})")
    parser.add_argument("--pool", type=int, default=20_000, help="scenes that are rendered once and drawn from (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")


class Training:
    """A network on its way: optimizer, averaged weights and the step reached, saved to and resumed from `file`.

    The learning rate rises over WARM_UP steps and falls to 0 along a cosine at `steps`. Every step draws from a generator seeded by
    (seed, step, worker), so a resumed training sees what an uninterrupted one would have seen. Started by torchrun, several
    workers of one thread each average their gradients: on a CPU that others use too, oneDNN's threads wait for each other in busy
    loops, and two workers are four times as fast as two threads.
    """

    def __init__(self, network: nn.Module, file: Path, *, steps: int, rate: float, seed: int) -> None:
        self.network, self.file, self.steps, self.rate, self.seed, self.step = network, file, steps, rate, seed, 0
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(_groups(self.trained), lr=rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
        self.average = [parameter.detach().clone() for parameter in self.trained]
        self.worker, self.workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.workers > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo")
        if file.is_file():
            self._load()

    def run(self, loss: Callable[[np.random.Generator, torch.Generator], Tensor]) -> None:
        """Take the steps that are left. `loss` gets the step's generators and returns a scalar."""
        running, started, first = 0.0, time.time(), self.step
        while self.step < self.steps:
            rng = np.random.default_rng((self.seed, self.step, self.worker))
            noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * group["share"] * learning_rate(self.step, self.steps)
            value = loss(rng, noise)
            self.optimizer.zero_grad()
            value.backward()
            self._share_gradients()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.step += 1
            torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - ema_decay(self.step))
            running += (value.item() - running) / min(self.step - first, LOG_EVERY)
            if self.worker:
                continue
            if self.step % LOG_EVERY == 0:
                print(f"step {self.step} loss {running:.4f} {(time.time() - started) / (self.step - first):.3f} s/step", flush=True)
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.save()

    def wait(self) -> None:
        """Wait for the other workers."""
        if self.workers > 1:
            distributed.barrier()

    def _share_gradients(self) -> None:
        """Give every worker the mean of all workers' gradients."""
        if self.workers == 1:
            return
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape)).div_(self.workers)

    def save(self) -> None:
        """Write `file`, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        scratch = self.file.with_suffix(".partial")
        torch.save(state, scratch)
        scratch.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the network."""
        for parameter, average in zip(self.trained, self.average, strict=True):
            parameter.copy_(average)


@torch.no_grad()
def load_average(network: nn.Module, file: Path, trained: nn.Module | None = None) -> None:
    """Put the averaged weights of the training `file` into `network`, of which it trained the part `trained` (None: all)."""
    state = torch.load(file, weights_only=True)
    network.load_state_dict(state["network"])
    for parameter, average in zip((trained or network).parameters(), state["average"], strict=True):
        parameter.copy_(average)


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters by the share of the learning rate that they take: weights with many inputs take less.

    One rate for all lets the wide convolutions of an autoencoder grow until its residual stream drowns every block.
    """
    shares = [1.0 if value.dim() < 2 else min(1.0, FAN_IN / (value[0].numel())) for value in parameters]
    groups = {share: [value for value, own in zip(parameters, shares, strict=True) if own == share] for share in shares}
    return [{"params": values, "share": share} for share, values in groups.items()]


def learning_rate(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def ema_decay(step: int) -> float:
    return min(EMA_DECAY, (1 + step) / (10 + step))


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """diffusers' RMSNorm over the last dimension, for torch.compile to do in one pass."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


@contextmanager
def fast_norm(compiled: bool = True) -> Iterator[None]:
    """diffusers' RMSNorm, compiled: on a CPU the autoencoder trains nearly twice as fast with it."""
    if not compiled:
        yield
        return
    plain: Any = RMSNorm.forward
    norm = torch.compile(rms_norm, dynamic=False)
    torch._dynamo.config.recompile_limit = 64
    RMSNorm.forward = lambda self, x: norm(x, self.weight, self.bias, self.eps)  # type: ignore[method-assign]
    try:
        yield
    finally:
        RMSNorm.forward = plain  # type: ignore[method-assign]
