"""Rules that no linter checks: who may use private members, names of classes, commands in errors, plain English."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.longest import LONGEST, TESTS

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "sana_export").rglob("*.py"))
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("tools/**/*.md"),
    ]
)
TREES = {path: ast.parse(path.read_text("utf-8")) for path in PACKAGE}
#: What starts with an underscore but has no public name: a documented function of the standard library, ATen operators, and what
#: PyTorch's own extension points hand over or ask for. `torch.nn.functional.scaled_mm` is newer than the oldest supported PyTorch.
FOREIGN = {
    "os._exit",
    "torch._ops",
    "_unsafe_view",
    "_to_copy",
    "_overloadpacket",
    "_schema",
    "Tensor._make_wrapper_subclass",
    "torch._C",
    "torch._scaled_mm",
}
#: Words of a command line's usage that stand for a value. A fix knows the value.
PLACEHOLDERS = re.compile(r"\b(MODEL|BUNDLE|BACKEND|PATH|FILE|DIR)\b")
#: What no native speaker writes, and what to write instead.
WORDS = {
    r"\bis not to be (asked|read|run)\b": "say what happens",
    r"\bthat is not read\b": "unsupported",
    r"\bto build (it|one) needs\b": "building requires",
    r"\bspeaks against\b": "why it cannot",
    r"\bof before\b": "older",
    r"\bmends? (it|them|that)\b": "fixes",
    r"(?<!there )\bis no (array|number|text|path|file|folder|integer|multiple)\b": "is not a",
    r"\bare no (array|number|text|path|file|folder)s?\b": "are not",
    r"\bkin\b": "related",
    r"\bsettles?\b": "choose",
    r"\badmits?\b": "check",
    r"\bwhy_not\b": "incompatibilities",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def own_members(tree: ast.Module) -> set[str]:
    """The private members that classes of a module define, and its private functions and constants."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def private(text: str) -> bool:
    return text.startswith("_") and not text.startswith("__")


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that use a private name of another module, or a private member of an object of another module's class."""
    own = own_members(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own | FOREIGN:
            text = ast.unparse(node)
            if text not in FOREIGN:
                yield node.lineno, text


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_private_members_are_used_where_they_are_defined(path: Path) -> None:
    assert list(private_uses(TREES[path])) == []


def test_the_search_finds_private_uses() -> None:
    source = "from a import _b\nclass C:\n  def __init__(self): self._own = 1\ndef f(c, d): return c._own, d._theirs, d.__dict__"
    assert list(private_uses(ast.parse(source))) == [(1, "_b"), (4, "d._theirs")]


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name(path))
    assert {key: value for key, value in places.items() if len(value) > 1} == {}


def fixes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The literal parts of the commands that errors name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "fix":
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_fixes_name_values_and_not_placeholders(path: Path) -> None:
    assert [(line, text) for line, text in fixes(TREES[path]) if PLACEHOLDERS.search(text)] == []


@pytest.mark.parametrize("path", [*PACKAGE, *DOCUMENTS], ids=name)
def test_plain_english(path: Path) -> None:
    text = path.read_text("utf-8")
    found = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: write {instead!r}"
        for word, instead in WORDS.items()
        for match in re.finditer(word, text, re.IGNORECASE)
    ]
    assert found == []


def test_the_test_files_that_run_first_exist() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
