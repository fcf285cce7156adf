"""What an unfinished export has finished, so that the next one goes on from there."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from sana_export.errors import ArtifactError
from sana_export.files import check_files, write_whole
from sana_export.manifest import GraphEntry, parse_graph

log = logging.getLogger(__name__)

JOURNAL = "export.json"


class Journal:
    """The finished graphs of an unfinished export in the folder `partial`. An export with another key is deleted."""

    def __init__(self, partial: Path, key: str) -> None:
        self.path, self.key = partial / JOURNAL, key
        self.graphs: dict[str, GraphEntry] = {}
        try:
            document = json.loads(self.path.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            document = {}
        if document.get("key") == key:
            self.graphs = {name: parse_graph(entry) for name, entry in document["graphs"].items()}
            log.info("continuing after %s", ", ".join(self.graphs) or "the start")
            remove_temporary(partial)
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def finished(self, names: Iterable[str]) -> dict[str, GraphEntry] | None:
        """The entries of the graphs `names`, which share a folder. None unless all are finished and their files are undamaged."""
        entries = {name: self.graphs[name] for name in names if name in self.graphs}
        if len(entries) < len(list(names)):
            return None
        try:
            check_files(self.path.parent, {file for entry in entries.values() for file in entry.files}, fix="")
        except ArtifactError as error:
            log.warning("exporting %s again: %s", ", ".join(names), error.message)
            return None
        return entries

    def add(self, entries: Mapping[str, GraphEntry]) -> None:
        """Record finished graphs."""
        self.graphs |= entries
        document = {"key": self.key, "graphs": {name: dataclasses.asdict(graph) for name, graph in self.graphs.items()}}
        write_whole(self.path, json.dumps(document))


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process left in the folder of an export, and what Windows keeps while it is mapped."""
    for path in [*folder.glob("tmp-*"), *folder.glob("onnx/*/tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)
