"""stderr: whole lines are never mixed up with the progress line."""

from __future__ import annotations

import io
import logging

import pytest

from sana_export.cli.terminal.console import QUIET, VERBOSE, Console, bar, logging_to, shortened
from sana_export.cli.terminal.text import plural, seconds, size, table
from sana_export.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that are visible in the end."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = line.split("\r\x1b[K")[-1]
            lines.append(shown)
        return lines


def test_steps_are_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(stream, VERBOSE)
    for done, name in enumerate(("context", "denoiser")):
        console.step(name, done, 2)
        console.step(name, done, 2)
    console.step("done", 2, 2)
    assert stream.getvalue() == "[1/2] context\n[2/2] denoiser\n"


def test_steps_are_silent_below_their_level() -> None:
    stream = io.StringIO()
    Console(stream, QUIET).step("context", 0, 2)
    assert stream.getvalue() == ""


def test_a_terminal_shows_a_bar_and_whole_lines() -> None:
    stream = Terminal()
    console = Console(stream, QUIET)
    console.step("context", 0, 4)
    console.step("denoiser", 2, 4, 0.5)
    assert stream.screen() == ["[############........] [3/4] denoiser 50%"]
    console.line("something happened")
    assert stream.screen() == ["something happened", ""]
    console.step("sampler", 3, 4)
    console.step("done", 4, 4)
    assert stream.screen()[-1] == ""


def test_progress_is_shown_as_a_step_and_its_fraction_if_known() -> None:
    stream = Terminal()
    console = Console(stream, QUIET)
    console.show(Progress("writing vae", 2.5, 4))
    assert stream.screen() == ["[############........] [3/4] writing vae 50%"]
    console.show(Progress("sampler", 3, 4))
    assert stream.screen() == ["[###############.....] [4/4] sampler"]
    console.show(Progress("done", 4, 4))
    assert stream.screen()[-1] == ""


def test_a_log_record_replaces_the_bar() -> None:
    stream = Terminal()
    console = Console(stream, QUIET)
    with logging_to(console, everything=False):
        console.step("context", 0, 4)
        logging.getLogger("sana_export.x").warning("careful")
        console.step("context", 0, 4, 0.5)
    assert stream.screen() == ["warning: careful", ""]


@pytest.mark.parametrize(
    ("text", "columns", "shown"), [("abcdef", 4, "abcd"), ("熊猫ab", 5, "熊猫a"), ("熊猫ab", 3, "熊"), ("🐼🎋", 4, "🐼🎋")]
)
def test_lines_are_cut_by_their_width_on_the_screen(text: str, columns: int, shown: str) -> None:
    assert shortened(text, columns) == shown


@pytest.mark.parametrize(("fraction", "text"), [(0, "[....]"), (0.5, "[##..]"), (1.2, "[####]")])
def test_bar(fraction: float, text: str) -> None:
    assert bar(fraction, 4) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (99_960, "100 kB"), (1_234_567, "1.2 MB"), (3.2e9, "3.2 GB")],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0042, "4 ms"), (0.35, "350 ms"), (12.34, "12.3 s"), (99.96, "1 min 40 s"), (125, "2 min 05 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_table_and_plural() -> None:
    assert table([("a", 1), ("long", 22)], ("name", "n"), "  ") == "  name  n\n  a     1\n  long  22"
    assert (plural(1, "image"), plural(3, "image")) == ("1 image", "3 images")
