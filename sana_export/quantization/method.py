"""How a scheme's numbers are chosen: the steps of a careful quantization. Each is optional, and `--quantize-method` names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sana_export.errors import UsageError

#: How the range of a layer's inputs is chosen from a sample of them: the largest magnitude, a percentile, or the least error.
RANGES = ("max", "percentile", "mse")
#: The largest rank of the branch in the bundle's precision.
MOST_RANK = 256
#: The word for no step at all.
NEAREST = "nearest"
#: What `--quantize-method` takes.
WORDS = (NEAREST, "rescale", "search", "gptq", "low-rank=RANK", *(f"ranges={name}" for name in RANGES))


@dataclass(frozen=True)
class Method:
    """Which steps an export takes. Without any, every weight is rounded to the nearest number that its scale allows."""

    #: Divide each input channel of a layer by a factor and multiply its weights by it (SmoothQuant, arXiv 2211.10438).
    rescale: bool = False
    #: Choose each weight scale by the least error, not by the largest weight.
    search: bool = False
    #: Let the weights that are still to be rounded make up for the error of those that are (GPTQ, arXiv 2210.17323).
    gptq: bool = False
    #: Rank of a branch in the bundle's precision beside each layer (SVDQuant, arXiv 2411.05007). 0: none.
    rank: int = 0
    #: How ranges of activations are chosen, one of `RANGES`.
    ranges: str = "max"

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of its steps."""
        given = {
            "rescale": self.rescale,
            "search": self.search,
            "gptq": self.gptq,
            "low-rank": self.rank,
            "ranges": self.ranges != "max",
        }
        return tuple(name for name, there in given.items() if there)

    @property
    def words(self) -> tuple[str, ...]:
        """What `--quantize-method` takes for it."""
        values = {"low-rank": f"low-rank={self.rank}", "ranges": f"ranges={self.ranges}"}
        return tuple(values.get(name, name) for name in self.steps) or (NEAREST,)

    @property
    def looks_at_data(self) -> bool:
        """Whether a step needs calibration, apart from the ranges of activations."""
        return self.rescale or self.gptq


def parse_method(words: Iterable[str]) -> Method | None:
    """The method that `--quantize-method` names; None without words: each scheme's own. Raises UsageError for an unknown word."""
    method, given = Method(), list(words)
    for word in given:
        name, _, value = word.partition("=")
        if word == NEAREST:
            if len(given) > 1:
                raise UsageError(f"{NEAREST} means none of the other steps", found=" ".join(given), wanted="it alone")
        elif word == "rescale":
            method = replace(method, rescale=True)
        elif word == "search":
            method = replace(method, search=True)
        elif word == "gptq":
            method = replace(method, gptq=True)
        elif name == "ranges" and value in RANGES:
            method = replace(method, ranges=value)
        elif name == "low-rank" and value.isdecimal() and 1 <= int(value) <= MOST_RANK:
            method = replace(method, rank=int(value))
        else:
            wanted = f"{', '.join(WORDS)}; RANK from 1 to {MOST_RANK}"
            raise UsageError("unknown step of quantization", found=word or "nothing", wanted=wanted)
    return method if given else None
