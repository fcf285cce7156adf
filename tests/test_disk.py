import errno
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sana_export import files as disk
from sana_export.errors import DependencyError
from sana_export.files import disk_errors, locked, require_free


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "not writable"), (errno.EROFS, "not writable"), (errno.EIO, "error")],
)
def test_os_errors_in_the_users_words(number: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    with pytest.raises(DependencyError, match=words) as caught, disk_errors(path):
        raise OSError(number, "Input/output error")
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), disk_errors(tmp_path):
        raise KeyboardInterrupt


def test_too_little_space_is_told_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)

    require_free(tmp_path, 1000, "the engine of denoiser")
    with pytest.raises(DependencyError, match="the engine of denoiser") as caught:
        require_free(tmp_path, 1001, "the engine of denoiser")
    assert "1000 bytes free" in str(caught.value)
    assert "1001 bytes" in str(caught.value)


def most_inside(path: Path, turns: int, **options: Any) -> int:
    """The most threads inside the lock at once, when four threads take it `turns` times each."""
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(turns):
            with locked(path, **options):
                inside += 1
                most = max(most, inside)
                time.sleep(0.05)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_a_lock_keeps_threads_apart_and_tells_who_waits(tmp_path: Path) -> None:
    waits: list[int] = []
    assert most_inside(tmp_path / "folder" / "lock", 1, on_wait=lambda: waits.append(1)) == 1
    assert len(waits) == 3


def test_a_lock_that_goes_keeps_threads_apart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waited for a removed lock file must not enter while another thread has the new one."""
    monkeypatch.setattr(disk, "_POLL_SECONDS", 0.001)
    assert most_inside(tmp_path / "lock", 3, remove=True) == 1
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock", remove=True):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sana_export.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    waits: list[float] = []

    def kill() -> None:
        waits.append(time.monotonic())
        holder.kill()

    with locked(tmp_path / "lock", kill):
        assert time.monotonic() - waits[0] < 5
    holder.wait()
    holder.stdout.close()
    assert len(waits) == 1


def test_a_lock_in_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DependencyError, match="cannot be written"), locked(tmp_path / "file" / "lock"):
        pass


def test_without_locks_on_the_file_system_it_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk, "_lock_nonblocking", refuse)
    with locked(tmp_path / "lock"):
        pass
    assert "No locks available" in caplog.text
