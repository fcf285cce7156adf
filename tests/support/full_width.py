"""Networks with the published widths and seeded weights, and the comparison of a float16 graph with its reference.

Nothing is downloaded. Tests that use this show that the graphs equal the reference at these shapes, with weights that keep
activations in a normal range (`sana_export.synth`) and with weights that do not (heat.py). tests/test_variants.py shows that the
configs are the published ones. Everything runs on a CPU in seconds.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2Model

from sana_export.export.half import WideProducts
from sana_export.export.parity import cosine, psnr, relative_error
from sana_export.graphs.numerics import FP16_MAX
from sana_export.synth.weights import fill

log = logging.getLogger(__name__)

COSINE_LIMIT = 0.999999
#: For float32 with another order of operations. A cosine of 0.999999 alone would accept an error of 1.4e-3.
RELATIVE_LIMIT = 1e-5
PSNR_LIMIT = 40.0
#: Needed besides the PSNR, because a few large channels raise the peak that the PSNR is relative to.
HALF_RELATIVE_LIMIT = 1e-2

CLASSES: dict[str, Callable[..., torch.nn.Module]] = {
    "transformer": SanaTransformer2DModel,
    "controlnet": SanaControlNetModel,
    "vae": AutoencoderDC,
    "text_encoder": lambda **config: Gemma2Model(Gemma2Config(**config)),
}


@torch.no_grad()
def build(component: str, config: Mapping[str, Any], seed: int) -> Any:
    """The reference's network in float32 with seeded weights. The encoder of a VAE is left out.

    The classes' own initialization is skipped, so weights are drawn only once.
    """
    with init_empty_weights(include_buffers=False):
        model = CLASSES[component](**config).eval()
    if component == "vae":
        model.encoder = torch.nn.Identity()
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(value.shape), requires_grad=False))
    fill(model, component, seed)
    return model


def seeded(*key: object) -> torch.Generator:
    """A generator for one test case, the same in every run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


class LargestHalf(TorchDispatchMode):
    """Records the largest magnitude of each operator's float16 results; infinity if one overflowed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, float] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        value = tree_leaves(results)[0]  # a layer norm also returns its statistics, which a graph does not store
        if torch.is_tensor(value) and value.dtype == torch.float16 and not function.is_view:
            name = function.overloadpacket.__name__
            self.largest[name] = max(value.abs().max().nan_to_num(torch.inf).item(), self.largest.get(name, 0.0))
        return results


def run_half(name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of the float16 graph `run`. Asserts that nothing in it overflows, not even before a clip."""
    with torch.no_grad(), WideProducts(), LargestHalf() as meter:
        found = run()
    operators = sorted(meter.largest.items(), key=lambda entry: -entry[1])
    log.info("%s: float16 results reach %s", name, ", ".join(f"{value:.5g} ({operator})" for operator, value in operators[:3]))
    assert operators[0][1] < FP16_MAX, operators[0]
    return found


def assert_equal(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare a float32 result with the float32 reference."""
    similarity, error, _ = _measure(name, found, wanted)
    assert similarity >= COSINE_LIMIT
    assert error <= RELATIVE_LIMIT


def assert_near(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare a float16 result with the float32 reference. The peak of the PSNR is the reference's range."""
    _, error, ratio = _measure(name, found, wanted)
    assert ratio >= PSNR_LIMIT
    assert error <= HALF_RELATIVE_LIMIT


def _measure(name: str, found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float, float]:
    """Cosine similarity, relative error and PSNR."""
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    pair = found.numpy(), wanted.numpy()
    similarity, error, ratio = cosine(*pair), relative_error(*pair), psnr(*pair)
    log.info("%s: 1 - cosine %.3g, relative error %.3g, PSNR %.2f dB", name, 1.0 - similarity, error, ratio)
    return similarity, error, ratio
