"""Image files: those that the server answers as URLs, and uploads."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from sana_export.serve.errors import Refusal
from sana_export.serve.url_files import UrlFiles
from tests.support.serving import image_file, picture

PNG = image_file(picture(5))


def test_what_a_killed_server_left_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    left = tmp_path / "sana-export-images-of-another"
    left.mkdir()
    old, fresh, other = left / "old.png", left / "fresh.png", tmp_path / "holiday.png"
    for path in (old, fresh, other):
        path.write_bytes(PNG)
    for path in (old, other):
        os.utime(path, (time.time() - 90, time.time() - 90))
    files = UrlFiles(tmp_path, 60, 2**20)
    files.expire_left()
    assert (old.exists(), fresh.exists(), other.exists()) == (False, True, True)
    files.close()


def test_a_file_that_cannot_be_deleted_is_logged_and_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    files = UrlFiles(tmp_path, 60, 2**20, lambda: now[0])
    names = [asyncio.run(files.store(PNG, "image/png")) for _ in range(2)]
    stubborn = files.folder / names[0]
    stubborn.unlink()
    stubborn.mkdir()  # unlink raises
    now[0] = 61.0
    files.expire()
    assert "cannot be deleted" in caplog.text
    assert [files.find(name) for name in names] == [None, None]
    assert not (files.folder / names[1]).exists()
    files.close()


def test_a_slow_disk_holds_up_no_other_request_and_counts_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write = threading.Event(), Path.write_bytes

    def slow(path: Path, content: bytes) -> int:
        go_on.wait(10)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", slow)

    async def case() -> None:
        files = UrlFiles(tmp_path, 60, 2 * len(PNG))
        writing = [asyncio.create_task(files.store(PNG, "image/png")) for _ in range(2)]
        await asyncio.sleep(0.05)  # returns: the loop is free
        assert not any(task.done() for task in writing)
        with pytest.raises(Refusal, match="no room"):
            await files.store(b"x", "image/png")
        go_on.set()
        names = [await task for task in writing]
        assert [found.path.read_bytes() for name in names if (found := files.find(name))] == [PNG, PNG]
        files.close()

    asyncio.run(case())


def test_pixels_of_an_upload_are_counted_before_it_is_decoded() -> None:
    from sana_export.serve.images import read_upload

    def code(content: bytes) -> str:
        with pytest.raises(Refusal) as caught:
            read_upload("image", content, 4096)
        return str(caught.value)

    whole = image_file(Image.new("RGB", (64, 64)))
    assert read_upload("image", whole, 4096).size == (64, 64)
    assert code(image_file(Image.new("RGB", (65, 64)))) == "image is too large: 65x64 pixels; at most 4096 pixels are allowed"
    for side, text in ((10_000, "10000x10000 pixels"), (100_000, "far too many pixels")):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + whole[24:29]
        bomb = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]  # says its size, and has few pixels
        assert text in code(bomb)
    for bad in (b"", b"hello", whole[:-30], image_file(Image.new("RGB", (8, 8)), "GIF")):
        assert "not a whole image" in code(bad)


def test_a_mask_is_transparent_or_white_where_the_image_changes() -> None:
    from sana_export.serve.images import read_mask

    for mode, stays, changes in (("RGBA", (0, 0, 0, 255), (255, 255, 255, 0)), ("L", 0, 255)):
        mask = Image.new(mode, (2, 1), stays)
        mask.putpixel((1, 0), changes)
        assert list(read_mask("mask", image_file(mask), 4096).convert("L").tobytes()) == [0, 255]
