"""What the stages of a recipe came to, kept beside the bundle, so that a stage whose inputs have not changed is not run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sana_export.cli.verb import Answer
from sana_export.environment import source_digest
from sana_export.files import disk_errors, hash_file
from sana_export.machine import describe_machine, describe_versions


class StageCache:
    """The file `<bundle>.stages.json`: for each stage the key of its inputs, its answer and when it was found."""

    def __init__(self, bundle: Path) -> None:
        self.path = bundle.with_name(bundle.name + ".stages.json")
        try:
            content = json.loads(self.path.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            content = {}
        self._entries: dict[str, Any] = content if isinstance(content, dict) else {}

    def find(self, stage: str, key: str) -> tuple[Answer, str] | None:
        """The recorded answer of `stage` and its time (ISO), where its inputs were those of `key` and its files are whole."""
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
        with disk_errors(self.path):
            partial = self.path.with_suffix(".json.tmp")
            partial.write_text(json.dumps(self._entries, indent=1), "utf-8")
            partial.replace(self.path)


def stage_key(export_key: str, settings: Mapping[str, Any]) -> str:
    """Hash of all that a stage's answer rests on: the bundle, its settings, this package, its libraries and the machine."""
    parts = [export_key, settings, source_digest("."), describe_versions(), describe_machine()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
