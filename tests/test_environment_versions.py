"""Facts about installed packages."""

from __future__ import annotations

from importlib import metadata

import pytest

from sana_export.environment import installed_version, release


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.11.0+cu130", (2, 11, 0)),
        ("10.12.0.36", (10, 12, 0, 36)),
        ("5.0rc1", (5, 0)),
        ("2.9.0.dev20250901", (2, 9, 0)),
        ("3", (3,)),
        ("unknown", ()),
    ],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers


def test_releases_compare_as_numbers() -> None:
    assert release("2.11.0+cu130") > release("2.9") > release("2.8.9")


def test_installed_version() -> None:
    assert installed_version("numpy") == metadata.version("numpy")
    assert installed_version("no-such-distribution") is None
