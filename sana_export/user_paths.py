"""Paths that users write, on the command line, in recipes and in Python: `~` is the home folder, and a name has to be one."""

from __future__ import annotations

import os
from pathlib import Path

from sana_export.errors import DependencyError, UsageError
from sana_export.numeric import shown

#: The longest name of a file or folder on the common file systems.
MOST_NAME_BYTES = 255
#: The longest path on Linux, without room for the files in a folder.
MOST_PATH_BYTES = 3072


def user_path(value: str | os.PathLike[str], what: str = "the path", home: str = "HOME") -> Path:
    """The path that a user wrote as `value`, with `~` as the home folder and `~name` as that of the user `name`, if there is one.

    `what` is what errors call it.

    `home` is the environment variable that an error tells the user to set if there is no home folder.

    Raises UsageError if it is empty, is not text, or contains what no file system or library accepts (a NUL, bytes that are not
    UTF-8, a name that is too long), and DependencyError if it starts with `~` and the home folder is not known.
    """
    try:
        text = os.fspath(value)
    except TypeError as error:
        raise UsageError(f"{what} is not a path", found=shown(value), wanted="a str or a pathlib.Path") from error
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise UsageError(f"{what} is not a path", found=shown(text), wanted="the name of a file or folder")
    check_unicode(text, what)
    own = text == "~" or text.startswith(("~/", f"~{os.sep}"))
    # For another user's home, pathlib fails if there is no such user.
    path = home_folder(home) / text[2:] if own else Path(os.path.expanduser(text))  # noqa: PTH111
    if longest := max((name for name in path.parts if len(name.encode()) > MOST_NAME_BYTES), default=None, key=len):
        raise UsageError(
            f"{what} has a name that is too long",
            found=f"{len(longest.encode())} bytes in {shown(longest)}",
            wanted=f"at most {MOST_NAME_BYTES} bytes between two slashes",
        )
    if len(str(path).encode()) > MOST_PATH_BYTES:
        raise UsageError(f"{what} is too long", found=f"{len(str(path).encode())} bytes", wanted=f"at most {MOST_PATH_BYTES} bytes")
    return path


def at_home(text: str, what: str) -> str:
    """`text`, a path or another name, with `~` at its start as the home folder. Raises the errors of `user_path`.

    A blank text stays as it is: its caller knows better what was wanted.
    """
    if not text.strip():
        return text
    path = user_path(text, what)
    return str(path) if text.startswith("~") else text


def check_unicode(text: str, what: str) -> None:
    """Raise UsageError if `text` has bytes that are not UTF-8, or lone surrogates: libraries and JSON files cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not UTF-8 text",
            found=shown(text),
            wanted="a name or text in UTF-8",
            fix="rename the file or folder, or set the terminal to UTF-8",
        ) from error


def home_folder(variable: str = "HOME") -> Path:
    """The user's home folder.

    Raises DependencyError if HOME is empty, or if neither HOME nor the system's list of users has it, as for a user id that a
    container makes up.
    `variable` is the environment variable that the error tells the user to set.
    """
    try:
        if os.environ.get("HOME") == "":  # it would be the root of the disk
            raise RuntimeError("HOME is empty")
        return Path.home()
    except RuntimeError as error:
        raise DependencyError(
            "the home folder of this user is not known",
            found="an empty HOME, or none in the environment and no home in the system's list of users",
            wanted=f"a folder that this user may write to, in {variable}",
            fix=f"export {variable}=/tmp/sana-export",
        ) from error
