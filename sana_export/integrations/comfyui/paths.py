"""Where ComfyUI's users keep bundles: the folder `models/sana`, any folder under `sana` in extra_model_paths.yaml, or anywhere."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import folder_paths

from sana_export.errors import UsageError
from sana_export.manifest import FILE_NAME
from sana_export.user_paths import user_path
from sana_export.variants import find_variant

#: The kind of models, and their folder's name.
KIND = "sana"


def register_folder() -> None:
    """Tell ComfyUI of the folder `models/sana`."""
    folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))  # noqa: PTH118  # ComfyUI wants text


def bundle_folder(name: str) -> Path:
    """The bundle that a user calls `name`: the name of one in ComfyUI's folders for them, or a path.

    Raises UsageError if there is none. It may not be a bundle.
    """
    path = user_path(name, "the bundle")
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(KIND)]
    found = next((folder for folder in (*(parent / path for parent in folders), path) if folder.is_dir()), None)
    if found is not None:
        return found
    names = sorted(manifest.parent.name for folder in folders for manifest in folder.glob(f"*/{FILE_NAME}"))
    raise UsageError(
        f"there is no bundle {name}",
        found=f"no such folder, and none in {folders[0]}",
        wanted=f"a bundle's folder, or a name: {', '.join(names)}" if names else "a bundle's folder",
        fix=shlex.join(["sana-export", "export", name, "-o", str(folders[0] / name)]) if find_variant(name) else None,
    )


def stamp(path: str | Path) -> tuple[int, int]:
    """Time and size of a file, which change if it is written again. (0, 0) if there is none."""
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
