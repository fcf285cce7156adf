"""`python -m sana_export` is the command line."""

from __future__ import annotations

from sana_export.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
