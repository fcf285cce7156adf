"""The guidance branches that the denoiser runs at each step, and the weights of their predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32, Index

#: (start, stop) as fractions of the steps: step i of N is inside if start <= i / N < stop.
Interval = tuple[float, float]
#: The interval of all steps.
WHOLE: Interval = (0.0, 1.0)
#: The branch with perturbed attention, which continues the branch before it. The others have prompts of their own.
PERTURBED = "perturbed"
#: With `pag_adaptive_scale`, diffusers lowers PAG by the distance of the timestep from this one.
_FIRST_TIMESTEP = 1000


@dataclass(frozen=True)
class Branches:
    """K guidance branches that run together, U of them with a prompt of their own."""

    #: "uncond" (the negative prompts), "cond" (the prompts) and "perturbed" (the prompts again), in this order, without the unused.
    names: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The U branches with a prompt of their own."""
        return tuple(name for name in self.names if name != PERTURBED)

    @property
    def perturbed(self) -> Float32:
        """float32 [K]: 1 for the branch with perturbed attention."""
        return np.array([name == PERTURBED for name in self.names], dtype=np.float32)

    @property
    def source(self) -> Index:
        """int64 [K]: which of the U branches each one continues."""
        return np.minimum(np.arange(len(self.names)), len(self.texts) - 1)

    @property
    def axes(self) -> dict[str, int]:
        """The lengths of the axes of contract.DYNAMIC_AXES that depend on the branches."""
        return {"branches": len(self.names), "text_branches": len(self.texts)}


@dataclass(frozen=True)
class Segment:
    """Consecutive steps with the same branches."""

    #: The first step.
    first: int
    #: The step after the last one.
    stop: int
    #: What the denoiser runs.
    branches: Branches


@dataclass(frozen=True, eq=False)
class Guidance:
    """The guidance of a run of N steps."""

    #: All branches that run at any step.
    branches: Branches
    #: All steps, in order. Neighbors have different branches.
    segments: tuple[Segment, ...]
    #: float32 [N, K]: the weight of each branch's prediction at each step; 0 where the branch does not run.
    weights: Float32


def make_guidance(
    scale: float,
    pag_scale: float,
    pag_adaptive_scale: float,
    timesteps: Float32,
    guidance_interval: Interval = WHOLE,
    pag_interval: Interval = WHOLE,
) -> Guidance:
    """The guidance at each of `timesteps` [N].

    Guidance is uncond + g * (cond - uncond) + p * (cond - perturbed), which is linear in the predictions. Outside its interval, g
    is 1 and p is 0, as without guidance, and the branch does not run. Source: diffusers `SanaPipeline.__call__` and
    `PAGMixin._apply_perturbed_attention_guidance`; the intervals are arXiv 2404.07724's, in steps instead of noise levels.
    """
    steps = len(timesteps)
    guided = inside(guidance_interval, steps) & (scale > 1)
    perturbed = inside(pag_interval, steps) & (pag_scale > 0)
    distance = _FIRST_TIMESTEP - timesteps.astype(np.float64)
    g = np.where(guided, scale, 1.0)
    # Without a PAG scale there is no perturbed branch, so the adaptive term does not apply either.
    p = np.where(perturbed, np.maximum(pag_scale - pag_adaptive_scale * distance, 0), 0)
    runs = {"uncond": guided, "cond": np.ones(steps, bool), PERTURBED: perturbed}
    weights = {"uncond": 1 - g, "cond": g + p, PERTURBED: -p}
    every = tuple(name for name, steps_of in runs.items() if steps_of.any())
    return Guidance(
        Branches(every),
        _segments(tuple(name for name in every if runs[name][step]) for step in range(steps)),
        np.stack([weights[name] for name in every], axis=1).astype(np.float32),
    )


def unguided(steps: int) -> Guidance:
    """One branch for `steps` steps."""
    return make_guidance(1.0, 0.0, 0.0, np.zeros(steps, np.float32))


def inside(interval: Interval, steps: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the steps 0 to `steps` - 1 are inside `interval`: bool [steps]."""
    start, stop = interval
    fractions = np.arange(steps) / steps
    return (start <= fractions) & (fractions < stop)


def parts(segments: Iterable[Segment], first: int, stop: int) -> list[Segment]:
    """The steps from `first` up to but not including `stop`, in segments."""
    clipped = (Segment(max(first, part.first), min(stop, part.stop), part.branches) for part in segments)
    return [part for part in clipped if part.first < part.stop]


def check_intervals(guidance_interval: Interval, guided: bool, pag_interval: Interval, perturbed: bool) -> None:
    """Raise UsageError for an interval of guidance that is off (`guided`, `perturbed`: whether it is on)."""
    for kind, interval, on, least, example in (
        ("guidance", guidance_interval, guided, 1, 4.5),
        ("pag", pag_interval, perturbed, 0, 2),
    ):
        if interval != WHOLE and not on:
            raise UsageError(
                f"{kind}_interval has no effect, because this guidance is off",
                found=f"{interval[0]:g} to {interval[1]:g}, and a {kind}_scale that is not above {least}",
                wanted=f"a {kind}_scale above {least}, or no {kind}_interval",
                fix=f"--{kind}-scale {example}, or leave out --{kind}-interval",
            )


def _segments(steps: Iterable[tuple[str, ...]]) -> tuple[Segment, ...]:
    """The segments of steps with these branches each."""
    found: list[Segment] = []
    for names, group in groupby(steps):
        first = found[-1].stop if found else 0
        found.append(Segment(first, first + len(list(group)), Branches(names)))
    return tuple(found)
