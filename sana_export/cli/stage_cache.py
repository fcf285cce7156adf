"""Results of a recipe's stages, kept beside the bundle. A stage whose inputs have not changed is not run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sana_export.cli.verb import Answer
from sana_export.environment import source_digest
from sana_export.files import hash_file, write_whole
from sana_export.machine import describe_machine, describe_versions


class StageCache:
    """The file `<bundle>.stages.json`: for each stage the key of its inputs, its answer, its files and when it finished."""

    def __init__(self, bundle: Path) -> None:
        self.path = bundle.with_name(bundle.name + ".stages.json")
        try:
            content = json.loads(self.path.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            content = {}
        self._entries: dict[str, Any] = content if isinstance(content, dict) else {}

    def find(self, stage: str, key: str) -> tuple[Answer, str] | None:
        """The recorded answer of `stage` and its time (ISO 8601).

        None if its key was another one, or a file that it wrote is missing or changed.
        """
        entry = self._entries.get(stage)
        if not entry or entry["key"] != key:
            return None
        if any(not Path(path).is_file() or hash_file(Path(path)) != digest for path, digest in entry["files"].items()):
            return None
        return Answer(entry["document"], entry["text"]), entry["finished"]

    def record(self, stage: str, key: str, answer: Answer, files: tuple[Path, ...] = ()) -> None:
        """Keep the answer of `stage`, which wrote `files`."""
        self._entries[stage] = {
            "key": key,
            "document": answer.document,
            "text": answer.text,
            "files": {str(path): hash_file(path) for path in files},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_whole(self.path, json.dumps(self._entries, indent=1))


def stage_key(export_key: str, settings: Mapping[str, Any]) -> str:
    """Hash of everything that a stage's answer depends on: bundle, settings, this package, its libraries and the machine."""
    parts = [export_key, settings, source_digest("."), describe_versions(), describe_machine()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
