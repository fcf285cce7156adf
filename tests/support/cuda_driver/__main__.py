"""`python -m tests.support.cuda_driver PYTEST-ARGUMENTS`: run tests on the stand-in for the CUDA driver."""

from __future__ import annotations

import sys

from tests.support.cuda_driver import ROOT, build, run_tests, why_not

if (reason := why_not()) is not None:
    sys.exit(reason)
done = run_tests(build(ROOT / ".pytest_cache" / "d" / "built"), sys.argv[1:])
sys.stdout.write(done.stdout)
sys.stderr.write(done.stderr)
sys.exit(done.returncode)
