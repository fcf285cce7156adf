"""Weight files of ONNX models that are links, as every file in the hub's cache is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def pass_linked_files(options: Any, folder: Path, data: Iterable[Path], real: Path | None = None) -> list[Any]:
    """Pass those of a model's `data` files in memory that are links out of its folder, which ONNX Runtime refuses to open.

    `options` are a session's. `folder` has the model's file, and `real` the file that it is if it is a link itself. Check the files
    first. Returns the maps of the files: keep them until the session is created. It copies what it needs.
    """
    allowed = (real or folder).resolve()
    linked = [path for path in data if not path.resolve().is_relative_to(allowed)]
    maps = [np.memmap(path, np.uint8, "r") for path in linked]
    if maps:
        names = [os.path.relpath(path, folder) for path in linked]
        options.add_external_initializers_from_files_in_memory(names, maps, [values.size for values in maps])
    return maps
