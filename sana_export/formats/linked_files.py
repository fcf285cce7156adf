"""Weight files of ONNX models that are links, as every file in the hub's cache is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sana_export.formats.onnx_weights import external_locations


def pass_linked_files(options: Any, model: bytes, folder: Path, real_folder: Path | None = None) -> list[Any]:
    """Pass those weight files of a model in memory that are links out of its folder, which ONNX Runtime refuses to open.

    `options` are a session's, and `model` is the content of a file in `folder`; `real_folder` is where that file is if it is a link
    itself. Check the files first. Returns the maps of the files: keep them until the session is created. It copies what it needs.
    """
    allowed = (real_folder or folder).resolve()
    paths = {location: folder / location for location in external_locations(model)}
    linked = {location: path for location, path in paths.items() if not path.resolve().is_relative_to(allowed)}
    maps = [np.memmap(path, np.uint8, "r") for path in linked.values()]
    if maps:
        options.add_external_initializers_from_files_in_memory(list(linked), maps, [values.size for values in maps])
    return maps
