"""The shape of a captured loop, and its buffers that depend on the guidance branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sana_export.runtime.backends.base import CapturingBackend, DeviceTensor
from sana_export.runtime.guidance import Branches, Segment


@dataclass(frozen=True)
class LoopShape:
    """Everything that the buffers and the captured steps of a loop depend on."""

    #: [B, C, h, w].
    latents: tuple[int, int, int, int]
    #: Shape of the context tensor (contract.CONTEXT), with all branches.
    context: tuple[int, ...]
    #: The guidance branches at each step.
    segments: tuple[Segment, ...]
    #: L, the number of text tokens in the context.
    text_tokens: int
    #: N, the number of steps.
    steps: int
    #: Whether the schedule adds fresh noise in every step.
    needs_noise: bool
    #: Whether the guidance scale is an input of the denoiser.
    guided: bool
    #: Whether the denoiser has the input `source`.
    perturbable: bool
    #: Whether a mask is applied after every step.
    blended: bool = False
    #: Shape of the denoiser's input `residuals` (contract.RESIDUALS), with all branches. None if it has no such input.
    residuals: tuple[int, ...] | None = None
    #: Shape of the ControlNet's context, with all branches. None without a control image.
    control_context: tuple[int, ...] | None = None

    @property
    def controlled(self) -> bool:
        """Whether the ControlNet runs in every step."""
        return self.control_context is not None

    @property
    def branch_sets(self) -> tuple[Branches, ...]:
        """The different branches of the segments, those of the largest first."""
        return tuple(sorted({part.branches for part in self.segments}, key=lambda branches: -len(branches.names)))

    def axes(self, branches: Branches) -> dict[str, int]:
        """The axes (contract.DYNAMIC_AXES) of a step with these branches."""
        batch, _, height, width = self.latents
        lengths = {"batch": batch, "latent_height": height, "latent_width": width, "text_tokens": self.text_tokens}
        return lengths | branches.axes


@dataclass(frozen=True, eq=False)
class BranchBuffers:
    """The buffers of the steps with certain branches."""

    #: float32 [K, B, C, h, w].
    noise_pred: DeviceTensor
    #: N rows, float32 [K].
    guidance_weights: Sequence[DeviceTensor]
    #: The denoiser's inputs that are the same in every step, by name, and its `residuals`.
    fixed: Mapping[str, DeviceTensor]
    #: The ControlNet's inputs that are the same in every step, by name. Empty without a control image.
    control: Mapping[str, DeviceTensor]


def branch_buffers(backend: CapturingBackend, shape: LoopShape, context_dtype: str) -> dict[Branches, BranchBuffers]:
    """The buffers for each set of branches of `shape`.

    Predictions, and the contexts of sets with the same prompts, share memory.
    """
    zeros, sets, batch = backend.zeros, shape.branch_sets, shape.latents[0]
    inputs = {"control": zeros(shape.latents, "float32"), "conditioning_scale": zeros((1,), "float32")} if shape.controlled else {}
    noise_pred = zeros((len(sets[0].names), *shape.latents), "float32")
    contexts = {
        branches.texts: {
            "context": zeros((*shape.context[:2], len(branches.texts), *shape.context[3:]), context_dtype),
            "context_mask": zeros((len(branches.texts), batch, shape.text_tokens), "float32"),
        }
        for branches in {branches.texts: branches for branches in sets}.values()
    }
    residuals = {texts: _with_texts(zeros, shape.residuals, 1, len(texts), context_dtype) for texts in contexts}
    controls = {texts: _with_texts(zeros, shape.control_context, 2, len(texts), context_dtype) for texts in contexts}
    found: dict[Branches, BranchBuffers] = {}
    for branches in sets:
        count = len(branches.names)
        fixed = {**contexts[branches.texts], "perturbed": zeros((count,), "float32")}
        if shape.perturbable:
            fixed["source"] = zeros((count,), "int64")
        if shape.guided:
            fixed["guidance"] = zeros((1,), "float32")
        fixed |= _named("residuals", residuals[branches.texts])
        control = {**inputs, **_named("context", controls[branches.texts])}
        control |= {"context_mask": fixed["context_mask"]} if control else {}
        table = backend.table(shape.steps, (count,), "float32")
        found[branches] = BranchBuffers(backend.leading(noise_pred, count), table, fixed, control)
    return found


def _with_texts(
    zeros: Callable[[Sequence[int], str], DeviceTensor], shape: Sequence[int] | None, axis: int, texts: int, dtype: str
) -> DeviceTensor | None:
    """A tensor of `shape` with `texts` branches at `axis`. None without a shape."""
    return None if shape is None else zeros((*shape[:axis], texts, *shape[axis + 1 :]), dtype)


def _named(name: str, tensor: DeviceTensor | None) -> dict[str, DeviceTensor]:
    return {} if tensor is None else {name: tensor}
