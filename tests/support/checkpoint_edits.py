"""Copies of a checkpoint with other configs. The weights are links, so a copy is cheap."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

#: Takes a key out of a config.
LEFT_OUT = object()


def linked_copy(source: Path, folder: Path) -> Path:
    """A copy of the checkpoint `source` whose weight files are hard links."""

    def copy(old: str, new: str) -> None:
        (os.link if old.endswith(".safetensors") else shutil.copyfile)(old, new)

    shutil.copytree(source, folder, copy_function=copy)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file, or take them out."""
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not LEFT_OUT}))


def edit_config(folder: Path, part: str, **changes: Any) -> None:
    """The same for the config of a part of a checkpoint; "index" is model_index.json."""
    names = {"index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    edit_json(folder / names.get(part, f"{part}/config.json"), **changes)
