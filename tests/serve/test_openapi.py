"""The API keeps its own schema: schemathesis sends what it allows and what it does not, to a real server.

`make test` runs some hundred cases, the same ones every time. With $SANA_EXPORT_FUZZ set, each route gets that many, and others.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.serve.server import ServerProcess
from tests.support.serve_clients import draw, small_images

LOG = logging.getLogger(__name__)
#: Cases of each route, besides those of schemathesis's examples and coverage.
FEW = 25
#: The least number of cases in all.
LEAST = 400
MANY = os.environ.get("SANA_EXPORT_FUZZ")
#: A schema cannot say which bytes are an image, or that a field needs another one, so not all that it allows is accepted.
#: Sequences of calls have nothing to find: nothing that clients make stays.
OPTIONS = ("--phases", "examples,coverage,fuzzing", "--checks", "all", "--exclude-checks", "positive_data_acceptance")


def run_schemathesis(url: str, folder: Path) -> tuple[int, str]:
    """Its exit code and what it printed. The folder gets `report.json`."""
    repeatable = () if MANY else ("--seed", "0")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--max-examples", MANY or str(FEW), *OPTIONS]
    files = ("--report", "json", "--report-json-path", str(folder / "report.json"), "--no-color")
    ran = subprocess.run([*command, *repeatable, *files], cwd=folder, capture_output=True, text=True, timeout=3600, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_the_api_keeps_its_schema(img2img_bundle: Path, build_cache: Path, tmp_path: Path) -> None:
    limits = ("--max-steps", 2, "--max-pixels", 128 * 128, "--max-images", 2, "--threads", 1)
    with ServerProcess(small_images(img2img_bundle, build_cache), *limits) as server:
        code, text = run_schemathesis(server.url, tmp_path)
        assert draw(server).status_code == 200
        errors = [line for line in server.log().splitlines() if "Traceback" in line or " 500 " in line]
    assert code == 0, text
    assert errors == []
    cases = json.loads((tmp_path / "report.json").read_text("utf-8"))["test_cases"]["generated"]
    LOG.info("%d cases", cases)
    assert cases >= LEAST, text
