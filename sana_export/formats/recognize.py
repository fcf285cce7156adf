"""What a file is when it is not what its place says: a git-lfs pointer, a web page, a pickle, another format.

Readers call `not_what_was_wanted` after they failed, so a file that can be read is never refused because of how it begins.
"""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sana_export.errors import ArtifactError

#: Extensions of pickled weights. A pickle can run code when it is loaded, so they are refused, or read without any code
#: (checkpoint/pickled.py).
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")

#: Bytes of a file that are looked at.
_HEAD = 4096
#: Characters of a text file that an error shows.
_SHOWN = 60
#: The longest header of a safetensors file.
_MOST_HEADER = 100_000_000


@dataclass(frozen=True)
class FileKind:
    """What a file is."""

    #: Its name, with an article.
    name: str
    #: What to do. None: what the reader advises for a damaged file.
    fix: str | None = None
    #: Whether it stands in for a file of any kind, as a pointer or an error page does.
    stands_in: bool = False


_PICKLE_FIX = (
    "convert it with the library that wrote it, for example with safetensors.torch.save_file; only load a pickle that you trust"
)
_UNPACK_FIX = "unpack it, and use the file that it contains"
_IMAGE_FIX = "check the name: this is not a model's file"

#: How files begin, with the offset of these bytes.
_MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    (
        0,
        b"GGUF",
        FileKind("a GGUF file, the format of llama.cpp", "use the model's .safetensors files: GGUF is not supported"),
    ),
    (0, b"ggjt", FileKind("a GGML file", "use the model's .safetensors files: GGML is not supported")),
    (0, b"\x93NUMPY", FileKind("a NumPy array (.npy)")),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file (.h5)")),
    (0, b"\x1f\x8b", FileKind("a gzip archive", _UNPACK_FIX)),
    (0, b"\xfd7zXZ\x00", FileKind("an xz archive", _UNPACK_FIX)),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", _UNPACK_FIX)),
    (0, b"\x28\xb5\x2f\xfd", FileKind("a zstd archive", _UNPACK_FIX)),
    (0, b"BZh", FileKind("a bzip2 archive", _UNPACK_FIX)),
    (0, b"Rar!", FileKind("a RAR archive", _UNPACK_FIX)),
    (257, b"ustar", FileKind("a tar archive", _UNPACK_FIX)),
    (0, b"\x89PNG\r\n\x1a\n", FileKind("a PNG image", _IMAGE_FIX)),
    (0, b"\xff\xd8\xff", FileKind("a JPEG image", _IMAGE_FIX)),
    (0, b"GIF8", FileKind("a GIF image", _IMAGE_FIX)),
    (8, b"WEBP", FileKind("a WebP image", _IMAGE_FIX)),
    (0, b"%PDF", FileKind("a PDF document", _IMAGE_FIX)),
    (0, b"ftrt", FileKind("a TensorRT engine")),
    (0, b"ptrt", FileKind("a TensorRT engine")),
    (0, b"\x7fELF", FileKind("a program")),
    (
        0,
        b"# xet version",
        FileKind("a pointer of Xet storage, not the file itself", "download the file itself, with `hf download`", True),
    ),
)


def recognize(path: Path) -> FileKind | None:
    """What the file at `path` is. None if nothing is known about files that begin this way."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return FileKind("a folder")
        if not stat.S_ISREG(status.st_mode):
            return FileKind("a device or a pipe")  # reading one may never end
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return None
    if not status.st_size:
        return FileKind("an empty file", stands_in=True)
    return next((kind for look in _LOOKS if (kind := look(path, head, status.st_size)) is not None), None)


def not_what_was_wanted(path: Path, wanted: str, found: object, *, fix: str | None = None) -> ArtifactError:
    """The error for a file that could not be read as `wanted`, a phrase such as "a safetensors file".

    It says what the file is. If that is unknown, the file is damaged, as `found` says, and `fix` is the advice.
    """
    kind = recognize(path)
    if kind is None or kind.name == wanted:
        return ArtifactError(f"{path} is damaged or truncated", found=found, wanted=wanted, fix=fix)
    return ArtifactError(f"{path} is not {wanted}", found=kind.name, wanted=wanted, fix=kind.fix or fix)


def refuse_pickle(path: Path, *, fix: str | None = None) -> None:
    """Raise ArtifactError if the extension of `path` is that of pickled weights."""
    if path.suffix.lower() in PICKLES:
        raise ArtifactError(
            f"{path} is not a safetensors file",
            found=f"a {path.suffix} file, which can run code when it is loaded",
            wanted="weights as .safetensors",
            fix=fix or _PICKLE_FIX,
        )


def _pointer(path: Path, head: bytes, size: int) -> FileKind | None:
    if not head.startswith(b"version https://git-lfs.github.com/spec/"):
        return None
    found = re.search(rb"^size (\d{1,18})\s*$", head, re.MULTILINE)
    folder = path.absolute().parent
    own = f", which has {int(found[1])} bytes" if found else ""
    if any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        fix = shlex.join(["git", "-C", str(path.parent), "lfs", "pull"])
    else:
        fix = "git lfs pull in the repository that it comes from, or download the file itself"
    return FileKind(f"a git-lfs pointer to the file{own}", fix, stands_in=True)


def _magic(path: Path, head: bytes, size: int) -> FileKind | None:
    return next((kind for offset, magic, kind in _MAGIC if head.startswith(magic, offset)), None)


def _zip(path: Path, head: bytes, size: int) -> FileKind | None:
    if not head.startswith(b"PK\x03\x04"):
        return None
    if re.search(rb"\.pkl|/byteorder|/version|\.data/", head):
        return FileKind("a pickle of PyTorch in a zip archive (.pt, .pth, .ckpt)", _PICKLE_FIX)
    if b".npy" in head[:256]:
        return FileKind("a NumPy archive (.npz)")
    return FileKind("a zip archive", _UNPACK_FIX)


def _pickle(path: Path, head: bytes, size: int) -> FileKind | None:
    """Protocols 2 to 5. The third byte of a safetensors file that begins like one is 0, which is not an opcode."""
    if re.match(rb"\x80[\x02-\x05][\x28-\x95]", head):
        return FileKind("a pickle, which can run code when it is loaded", _PICKLE_FIX)
    return None


def _page(path: Path, head: bytes, size: int) -> FileKind | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")) or (start.startswith(b"<?xml") and b"<html" in start):
        title = re.search(rb"<title[^>]*>\s*([^<]{1,200})", head, re.IGNORECASE)
        named = f" with the title {_text(title[1])!r}" if title else ""
        return FileKind(f"an HTML page{named}: a login or error page instead of the file", "download the file itself", True)
    if start.startswith(b"<?xml"):
        return FileKind("an XML document: an error message instead of the file", "download the file itself", True)
    return None


def _onnx(path: Path, head: bytes, size: int) -> FileKind | None:
    """The first field of an ONNX model is ir_version; the producer's name or the graph follows."""
    return FileKind("an ONNX model") if re.match(rb"\x08[\x03-\x20][\x12\x3a\x42]", head) else None


def _sentencepiece(path: Path, head: bytes, size: int) -> FileKind | None:
    """The first field of a SentencePiece model is a piece, which begins with its text."""
    if re.match(rb"\x0a.\x0a.<(unk|pad|s|bos|eos)>", head, re.DOTALL):
        return FileKind("a SentencePiece model (tokenizer.model)")
    return None


def _safetensors(path: Path, head: bytes, size: int) -> FileKind | None:
    length = int.from_bytes(head[:8], "little")
    found = 2 <= length <= _MOST_HEADER and re.match(rb"\s*\{\s*[\"}]", head[8:])
    return FileKind("a safetensors file") if found else None


def _json(path: Path, head: bytes, size: int) -> FileKind | None:
    if path.suffix == ".json" or not re.match(rb"\s*[{\[]", head):
        return None
    if b'"weight_map"' in head:
        return FileKind("the index of a sharded model, not its weights", "name the folder that contains the shards")
    if re.match(rb'\s*\{\s*"(error|message|detail|status)"', head):
        return FileKind(f"an error message of a server, {_text(head)!r}", "download the file itself", True)
    return FileKind("a JSON document")


def _zeros(path: Path, head: bytes, size: int) -> FileKind | None:
    return None if head.strip(b"\0") else FileKind("a file of zeros, as an interrupted download leaves it", stands_in=True)


def _plain_text(path: Path, head: bytes, size: int) -> FileKind | None:
    if path.suffix == ".json":
        return None
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if not text.strip() or not all(character.isprintable() or character in "\r\n\t" for character in text):
        return None
    return FileKind(f"a text, {_text(head)!r}")


def _text(head: bytes) -> str:
    """The first characters of a text, on one line."""
    text = " ".join(head[: 4 * _SHOWN].decode("utf-8", "replace").split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


_LOOKS: tuple[Callable[[Path, bytes, int], FileKind | None], ...] = (
    _pointer,
    _magic,
    _zip,
    _pickle,
    _page,
    _onnx,
    _sentencepiece,
    _safetensors,
    _json,
    _zeros,
    _plain_text,
)
