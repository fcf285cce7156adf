"""Numbers that users give: of the right type and within limits, whatever they come from."""

from __future__ import annotations

import math
import operator
from typing import Any

from sana_export.errors import UsageError

#: The largest guidance scale, and the largest factor on a LoRA. Useful values are below 20.
MOST_SCALE = 1000.0
#: Pixels: twice the longest side of Sana's largest resolution bin. Memory runs out long before.
MAX_SIDE = 16384
#: Images of one call.
MAX_IMAGES = 1024
#: Sana was trained with 1000 timesteps.
MAX_STEPS = 1000
#: Rounds of a benchmark.
MAX_ROUNDS = 1000
#: Threads for work on the CPU. The largest machines have fewer cores.
MOST_THREADS = 1024
#: The largest index of a GPU.
MOST_DEVICES = 1023
#: A value in an error is cut to this many characters.
_SHOWN = 100


def integer(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. Raises UsageError, which calls it `name`, unless it is an integer from `least` to `most`.

    Integers of numpy and torch are taken, also as arrays without axes. Booleans and texts are not.
    """
    wanted = f"an integer from {least} to {most}"
    number = as_integer(value)
    if number is None:
        raise UsageError(f"{name} is not an integer", found=shown(value), wanted=wanted)
    if not least <= number <= most:
        raise UsageError(f"{name} is out of range", found=shown(value), wanted=wanted)
    return number


def real(name: str, value: Any, least: float, most: float) -> float:
    """`value` as a float. Raises UsageError, which calls it `name`, unless it is a number from `least` to `most`.

    Numbers of numpy and torch are taken, also as arrays without axes. Booleans, texts, complex numbers and other arrays are not.
    """
    wanted = f"a number from {least:g} to {most:g}"
    try:
        number = float(value) if _is_number(value) else None
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    except Exception:  # any: the object is the caller's
        number = None
    if number is None:
        raise UsageError(f"{name} is not a number", found=shown(value), wanted=wanted)
    if not least <= number <= most:  # NaN is never in between
        raise UsageError(f"{name} is out of range", found=shown(value), wanted=wanted)
    return number


def as_integer(value: Any) -> int | None:
    """`value` as an int; None unless it is an integer."""
    try:
        return operator.index(value) if _is_number(value) else None
    except Exception:  # TypeError, or any: the object is the caller's
        return None


def _is_number(value: Any) -> bool:
    """Whether `value` may be one real number: not a text, a boolean, a complex number, a duration, or an array with axes."""
    if isinstance(value, str | bytes | bytearray | bool):
        return False
    kind = str(getattr(value, "dtype", ""))  # of numpy and torch; their scalars and arrays convert all of these
    return not getattr(value, "ndim", 0) and not any(other in kind for other in ("bool", "complex", "time"))


def shown(value: object) -> str:
    """A value as an error shows it: its `repr`, shortened. Python refuses to print integers of more than 4300 digits."""
    try:
        text = repr(value)
    except Exception as error:  # any: the object is the caller's
        return f"a {type(value).__name__} that cannot be printed ({error})"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
