"""Numbers that users give: of the right type and within limits, whatever they come from."""

from __future__ import annotations

import math
import operator
from typing import Any

from sana_export.errors import UsageError

#: The largest guidance scale, and the largest factor on a LoRA. Useful values are below 20.
MOST_SCALE = 1000.0
#: Threads for work on the CPU. The largest machines have fewer cores.
MOST_THREADS = 1024
#: The largest index of a GPU.
MOST_DEVICES = 1023
#: A value in an error is cut to this many characters.
_SHOWN = 100


def integer(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. Raises UsageError, which calls it `name`, unless it is an integer from `least` to `most`.

    Integers of numpy are taken. Booleans and texts are not.
    """
    wanted = f"an integer from {least} to {most}"
    try:
        number = operator.index(value)
    except Exception as error:  # TypeError, or any: the object is the caller's
        raise UsageError(f"{name} is not an integer", found=shown(value), wanted=wanted) from error
    if isinstance(value, bool) or not least <= number <= most:
        raise UsageError(f"{name} is out of range", found=shown(value), wanted=wanted)
    return number


def real(name: str, value: Any, least: float, most: float) -> float:
    """`value` as a float. Raises UsageError, which calls it `name`, unless it is a number from `least` to `most`.

    Numbers of numpy are taken. Booleans, texts and arrays are not, not even arrays of one number.
    """
    wanted = f"a number from {least:g} to {most:g}"
    number = None
    try:
        if not isinstance(value, str | bytes | bytearray) and type(value).__name__ not in ("bool", "bool_", "ndarray"):
            number = float(value)
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    except Exception as error:  # any: the object is the caller's
        raise UsageError(f"{name} is not a number", found=shown(value), wanted=wanted) from error
    if number is None:
        raise UsageError(f"{name} is not a number", found=shown(value), wanted=wanted)
    if not least <= number <= most:  # NaN is never in between
        raise UsageError(f"{name} is out of range", found=shown(value), wanted=wanted)
    return number


def shown(value: object) -> str:
    """A value as an error shows it: its `repr`, shortened. Python refuses to print integers of more than 4300 digits."""
    try:
        text = repr(value)
    except Exception as error:  # any: the object is the caller's
        return f"a {type(value).__name__} that cannot be printed ({error})"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
