"""The place of a folder that is written whole: what it replaces, and what is left if writing fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_export.errors import UsageError
from sana_export.output_folder import OutputFolder

RECORD = "record.json"


@pytest.fixture
def place(tmp_path: Path) -> OutputFolder:
    return OutputFolder.of(tmp_path / "my files")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def stop(partial: Path) -> None:
    (partial / "new").write_text("new")
    raise RuntimeError("stopped")


def test_what_is_replaced(place: OutputFolder) -> None:
    place.check_replaceable(RECORD, "a layout", "-o")  # nothing
    place.folder.mkdir()
    place.check_replaceable(RECORD, "a layout", "-o")
    (place.folder / RECORD).touch()
    (place.folder / "model.onnx").touch()
    place.check_replaceable(RECORD, "a layout", "-o")


@pytest.mark.parametrize("name", ["", "thesis.txt", ".hidden"])
def test_what_is_not_replaced(name: str, place: OutputFolder) -> None:
    (place.folder / name).parent.mkdir(exist_ok=True)
    (place.folder / name).touch()
    with pytest.raises(UsageError, match="my files holds something that is not a layout") as caught:
        place.check_replaceable(RECORD, "a layout", "-o")
    assert (caught.value.found, caught.value.fix) == ("no record.json in it" if name else "a file", f"-o '{place.folder}-2'")


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_is_written_whole_or_not_at_all(inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if inside:
        monkeypatch.chdir(folder)
    place = OutputFolder.of(folder)
    assert place.inside == inside
    (folder / "old").write_text("old")
    place.partial.mkdir()
    (place.partial / "killed").touch()
    with pytest.raises(RuntimeError, match="stopped"), place.written(RECORD) as partial:
        stop(partial)
    assert content(folder) == {"old": "old"}
    with place.written(RECORD) as partial:
        for name in ("new", RECORD):
            (partial / name).write_text("new")
    assert content(folder) == {"new": "new", RECORD: "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_replacement_is_undone(place: OutputFolder) -> None:
    place.old.mkdir()
    (place.old / "x").write_text("kept")
    place.restore()
    assert content(place.folder) == {"x": "kept"}
