"""`python -m sana_export.integrations.comfyui COMFYUI`: copy the node pack into the ComfyUI in the folder COMFYUI."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from sana_export.errors import DependencyError, SanaExportError, UsageError
from sana_export.user_paths import user_path

PACK = Path(__file__).parent / "pack"
#: The pack's folder in `custom_nodes`.
NAME = "sana_export"


def install(comfyui: str | Path) -> Path:
    """Copy the node pack into ComfyUI's `custom_nodes`, over an older copy. Returns its folder.

    Raises UsageError if `comfyui` is not ComfyUI's folder or has something else in the pack's place, and DependencyError if nothing
    can be written there.
    """
    folder = user_path(comfyui, "ComfyUI's folder")
    if not (folder / "custom_nodes").is_dir() or not (folder / "folder_paths.py").is_file():
        raise UsageError(
            f"{folder} is not ComfyUI's folder",
            found="no custom_nodes and folder_paths.py in it" if folder.is_dir() else "no such folder",
            wanted="the folder with ComfyUI's main.py",
        )
    target = folder / "custom_nodes" / NAME
    if target.is_symlink() or (target.exists() and not (target / "api_workflows").is_dir()):
        raise UsageError(
            f"{target} is not a copy of the node pack",
            found="a link" if target.is_symlink() else "something else",
            wanted="an older copy, or nothing",
            fix=f"move {target} away, or leave the link as it is: it needs no copy",
        )
    try:
        shutil.copytree(PACK, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    except OSError as error:
        raise DependencyError(
            f"the node pack cannot be copied to {target}", found=error, wanted="a folder that may be written to"
        ) from error
    return target


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code, as those of `sana-export`."""
    parser = argparse.ArgumentParser(prog="python -m sana_export.integrations.comfyui", description="Install the nodes in ComfyUI.")
    parser.add_argument("comfyui", metavar="COMFYUI", help="the folder with ComfyUI's main.py")
    try:
        target = install(parser.parse_args(arguments).comfyui)
    except SanaExportError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{target}\nRestart ComfyUI. The nodes are under sana_export, the workflows under Browse Templates.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
