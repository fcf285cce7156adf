"""`python -m sana_export` is the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def leave_out_current_folder() -> None:
    """Take the current folder, which `python -m` puts first, out of `sys.path`, unless the package comes from there.

    A folder of the user's that is called `tensorrt`, or a file `json.py`, would otherwise be imported as a module.
    """
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != str(Path(__file__).parent.parent):  # noqa: PTH109
        del sys.path[0]


if __name__ == "__main__":
    leave_out_current_folder()
    from sana_export.cli.main import main

    raise SystemExit(main())
