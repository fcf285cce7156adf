"""Finds out what a program imports."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnxscript", "safetensors", "tensorrt", "tensorrt_rtx")


def heavy_modules(program: str) -> set[str]:
    """The packages of `HEAVY` that a fresh interpreter has imported after running `program`."""
    report = f"\nimport json, sys\nsys.stderr.write('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def line(*arguments: object) -> str:
    """A program that runs the command line `arguments` and fails unless it succeeds."""
    return (
        "from sana_export.cli.main import main\n"
        "try:\n"
        f"    code = main({[str(argument) for argument in arguments]!r})\n"
        "except SystemExit as end:\n"
        "    code = end.code or 0\n"
        "assert code == 0, code\n"
    )
