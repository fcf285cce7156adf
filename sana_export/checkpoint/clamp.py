"""Whether a checkpoint was trained with self-attention outputs clipped to +-65504, which makes the clip part of its function.

In the checkpoints trained in fp16, self-attention outputs exceed the largest fp16 number, and diffusers' fp16 code clips them. The
same weights in float32 or bfloat16 without the clip give broken images (https://github.com/huggingface/diffusers/issues/10336). So
the dtype that the weights happen to be stored in does not decide: a published fp16 checkpoint has float32 files too. A checkpoint
trained in bf16 needs no clip, and its outputs stay below the limit. In doubt the clip is therefore the safe choice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sana_export.variants import Variant


@dataclass(frozen=True)
class Clamp:
    """Whether to clip."""

    #: Whether to clip.
    on: bool
    #: How that is known.
    reason: str
    #: Whether it is known. False: it is the safe choice.
    certain: bool = True


def trained_with_clamp(rows: Sequence[Variant], names: Collection[str], stored: str) -> Clamp:
    """Decide from the rows of variants.py with the same transformer, the `names` of its weight files, and their dtype.

    `names` are those of all variants, also of files that the export does not read. `stored` is a safetensors dtype.
    """
    families = {row.clamp for row in rows}
    if len(families) == 1:
        return Clamp(families.pop(), f"the table of variants says so for {' and '.join(row.alias for row in rows)}")
    if stored == "F16":
        return Clamp(True, f"its transformer is stored as {stored}")
    if beside := sorted(name for name in names if ".fp16" in name):
        return Clamp(True, f"it was trained in fp16, because its transformer has fp16 weights too ({beside[0]})")
    if stored == "BF16" or not families:
        return Clamp(False, f"its transformer is stored as {stored}")
    if beside := sorted(name for name in names if ".bf16" in name):
        return Clamp(False, f"it was trained in bf16, because its transformer has bf16 weights too ({beside[0]})")
    clipped, plain = ([row.alias for row in rows if row.clamp == clamp] for clamp in (True, False))
    reason = (
        f"its config fits {' and '.join(clipped)} (trained in fp16, broken images without the clip) and {' and '.join(plain)} "
        f"(trained in bf16), and its {stored} files do not say which it is"
    )
    return Clamp(True, reason, certain=False)
