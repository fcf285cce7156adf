"""Numbers of any origin: taken if they are one real number, refused otherwise."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sana_export.errors import UsageError
from sana_export.numeric import as_integer, integer, real


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)], ids=repr)
def test_integers(value: Any) -> None:
    assert (integer("n", value, 1, 5), real("x", value, 1, 5), as_integer(value)) == (3, 3.0, 3)


@pytest.mark.parametrize(
    "value", [2.5, np.float16(2.5), np.array(2.5), torch.tensor(2.5), Decimal("2.5"), Fraction(5, 2)], ids=repr
)
def test_real_numbers_are_no_integers(value: Any) -> None:
    assert real("x", value, 1, 5) == 2.5
    with pytest.raises(UsageError, match="n is not an integer"):
        integer("n", value, 1, 5)


@pytest.mark.parametrize(
    "value",
    [
        *(True, np.True_, np.array(True), torch.tensor(True)),
        *(np.array([3]), np.array([[3]]), torch.tensor([3]), [3]),
        *(3 + 0j, np.complex64(3), torch.tensor(3 + 0j), np.timedelta64(3)),
        *("3", b"3", np.str_("3"), None, object),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("error")
def test_what_is_not_one_number(value: Any) -> None:
    for check in (integer, real):
        with pytest.raises(UsageError, match=r"n is not|n is out of range"):
            check("n", value, 0, 5)
    assert as_integer(value) is None


@pytest.mark.parametrize("text", ["1e400", "-1e400", "nan", "inf", "1000.5"])
def test_numbers_out_of_range(text: str) -> None:
    for value in (float(text), Decimal(text), *([int(Decimal(text))] if "e" in text else [])):
        with pytest.raises(UsageError, match="x is out of range"):
            real("x", value, -1000, 1000)
