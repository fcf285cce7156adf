"""Runs one part in its own process. It reads the request from one file and writes the answer, also a partial one, to another.

`python -m sana_export.bench.gpu_check.child REQUEST.json ANSWER.json`
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import FAILED, PASSED, SKIPPED, Check, CheckFailed, PartContext
from sana_export.errors import DependencyError, SanaExportError
from sana_export.files import write_whole


def main() -> None:
    request, answer = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("sana_export").setLevel(logging.INFO)
    found: dict[str, Any] = {}

    def write(status: str | None, reason: str | None = None) -> None:
        write_whole(answer, json.dumps({"status": status, "reason": reason, "found": found}))

    def keep(more: Mapping[str, Any]) -> None:
        found.update(more)
        write(None)

    try:
        module, _, function = request["target"].partition(":")
        check: Check = getattr(importlib.import_module(module), function)
        found.update(check(PartContext(Path(request["work"]), request["device"], keep), **request["arguments"]))
    except CheckFailed as error:
        write(FAILED, str(error))
    except DependencyError as error:
        write(SKIPPED, str(error))
    except SanaExportError as error:
        write(FAILED, str(error))
    except Exception as error:  # the report gives the reason
        traceback.print_exc()
        write(FAILED, f"{type(error).__name__}: {error}")
    else:
        write(PASSED)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the answer is written; a library that crashes or hangs at exit must not change it


if __name__ == "__main__":
    main()
