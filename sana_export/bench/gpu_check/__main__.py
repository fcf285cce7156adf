"""`python -m sana_export.bench.gpu_check`: runs the parts and writes the report. `make gpu-check` calls it (tools/gpu_check.py).

Exit codes: 0 if the report is written and no check failed, 3 if there is no GPU, 5 if a check failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.find import installed
from sana_export.bench.gpu_check.parts import PARTS, CheckPart
from sana_export.bench.gpu_check.privacy import Redaction
from sana_export.bench.gpu_check.report import Report
from sana_export.bench.gpu_check.runner import Capabilities, Outcome, PartRunner
from sana_export.environment import source_digest
from sana_export.machine import describe_machine, describe_versions

#: Seconds for the whole run, counted from `--started`.
LIMIT = 1800.0


def main(arguments: Sequence[str] | None = None, parts: Sequence[CheckPart] = PARTS) -> int:
    """Run the parts and write the report; returns the exit code."""
    options = _parse(arguments)
    elapsed = max(time.time() - options.started, 0.0) if options.started else 0.0
    began = time.monotonic() - elapsed
    chosen = [part for part in parts if part.name == "find" or any(fnmatch.fnmatch(part.name, want) for want in options.only)]
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=describe_versions(),
        device=options.device,
        limit_seconds=options.limit,
        setup=json.loads(options.setup.read_text("utf-8")) if options.setup else {},
        planned=tuple(part.name for part in chosen),
    )
    redaction = Redaction.of_this_machine(options.work)
    key = hashlib.sha256(json.dumps([source_digest("."), report.versions, report.machine["gpu"], options.device]).encode())
    runner = PartRunner(
        options.work.resolve(),
        Capabilities(None, ()),
        options.device,
        began + options.limit,
        key.hexdigest(),
        options.resume,
    )

    def record(part: CheckPart, outcome: Outcome) -> None:
        if part.name == "find":
            runner.capabilities = _capabilities(outcome)
        report.outcomes[part.name] = outcome
        report.seconds = round(time.monotonic() - began, 1)
        report.write(options.report, redaction)
        reason = f": {' '.join(outcome.reason.split())[:200]}" if outcome.reason else ""
        _say(f"[{report.seconds:5.0f} s] {part.name}: {outcome.status}{reason}")

    runner.run(chosen, record)
    _say(f"wrote {options.report} and {options.report.with_suffix('.md')}" + ("" if report.has_gpu else "; there is no GPU"))
    return report.exit_code


def _capabilities(outcome: Outcome) -> Capabilities:
    """What the part `find` found. If it failed, what is known without it."""
    known = outcome.found.get("modules")
    if known is None:
        names = {name for part in PARTS for name in (*part.modules, *part.one_of)}
        return Capabilities(None, {name for name in names if installed(name)})
    working = {name: answer for name, answer in known.items() if "error" not in answer}
    without_gpu = {name: reason for name, answer in working.items() if (reason := answer.get("no_gpu"))}
    return Capabilities(outcome.found.get("compute_capability"), working, without_gpu)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description="Every check and timing that needs a GPU, with one report.")
    parser.add_argument(
        "--report", type=Path, default=Path("benchmarks/out/gpu-check.json"), help="the JSON file; the page is written beside it"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/out/gpu-check"), help="folder for intermediate files and logs"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help=f"seconds for the whole run (default: {LIMIT:.0f})")
    parser.add_argument("--started", type=float, metavar="T", help="when the run began, as a value of time.time()")
    parser.add_argument("--resume", action="store_true", help="keep the results of an earlier run of the same code on this machine")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PART", help="only these parts, for example 'parity/*'")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: run the parts on the CPU, to test the parts themselves"
    )
    parser.add_argument("--setup", type=Path, help="JSON file that says what was installed for the run")
    options: Any = parser.parse_args(arguments)
    assert isinstance(options, argparse.Namespace)
    return options


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main())
