"""Type names of numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
