"""Adds `optimum-cli export sana` and `optimum-cli sana` to optimum's command line.

optimum imports every file of this folder, which all packages share. So neither this folder nor those above it may have an
`__init__.py`, and nothing heavy may be imported here.
"""

from optimum.commands.export.base import ExportCommand

from sana_export.cli.optimum_commands import ExportSana, Sana

REGISTER_COMMANDS = [(ExportSana, ExportCommand), (Sana, None)]
