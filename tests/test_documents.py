"""The documents: links that lead somewhere, tables that can be read, and names that the code has."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from sana_export import manifest
from sana_export.cli import recipe
from sana_export.cli.main import make_parser
from sana_export.contract import DYNAMIC_AXES, GRAPHS
from sana_export.runtime.request import Request

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "tools/**/*.md", "examples/**/*.md")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in PATTERNS
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).as_posix().startswith(("benchmarks/out/", "examples/javascript/node_modules/"))
)
#: Characters of a table's cell.
WIDEST_CELL = 200
#: What stands for a name or number in a quoted error.
PLACEHOLDER = "…"
#: `[text](target)`, also around an image, and `[name]: target`.
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)


def text_of(document: str) -> str:
    return (ROOT / document).read_text("utf-8")


def prose(text: str) -> str:
    """`text` without its blocks of code."""
    return re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """`text` without any code: what looks like a link in there is none."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", prose(text))


@cache
def anchors(document: str) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text_of(document)), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return frozenset(names)


def links(document: str) -> list[str]:
    return [first or second for first, second in LINK.findall(without_code(text_of(document)))]


def python_blocks(document: str) -> list[str]:
    return [
        textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text_of(document), re.MULTILINE | re.DOTALL)
    ]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every line of every table."""
    for line in prose(text).splitlines():
        if line.lstrip().startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(document: str) -> None:
    broken = []
    for link in links(document):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / unquote(path) if path else ROOT / document
        if not target.exists() or not target.resolve().is_relative_to(ROOT):
            broken.append(f"{link}: no such file in this repository")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target.resolve().relative_to(ROOT).as_posix())):
            broken.append(f"{link}: no such heading")
    assert not broken


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name == "README.md" or name.startswith("docs/")])
def test_no_cell_of_a_table_is_too_wide_to_read(document: str) -> None:
    wide = [f"{len(cell)} characters: {cell}" for cells in rows(text_of(document)) for cell in cells if len(cell) > WIDEST_CELL]
    assert not wide


@pytest.mark.parametrize("document", ["docs/reports.md", "docs/compatibility.md"])
def test_every_named_test_file_exists(document: str) -> None:
    named = set(re.findall(r"`((?:\w+/)*test_\w+\.py)`", text_of(document)))
    assert named
    assert not [name for name in named if not (ROOT / "tests" / name).is_file()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(document: str) -> None:
    uneven, width = [], 0
    for line in [*prose(text_of(document)).splitlines(), ""]:
        cells = next(rows(line), None)
        if cells is None:
            width = 0
        elif width and len(cells) != width:
            uneven.append(line)
        else:
            width = len(cells)
    assert not uneven


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if python_blocks(name)])
def test_python_in_a_document_parses_and_imports_what_exists(document: str) -> None:
    imports = [
        (node.module, alias.name)
        for block in python_blocks(document)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "sana_export"
        for alias in node.names
    ]
    missing = [f"{module}.{name}" for module, name in dict.fromkeys(imports) if not exists(module, name)]
    assert not missing


def exists(module: str, name: str) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


def test_every_document_is_in_the_index() -> None:
    """Or, for a report that somebody adds, in the index of reports."""
    indexes = ("docs/index.md", "benchmarks/results/README.md")
    targets = [(ROOT / index).parent / link.partition("#")[0] for index in indexes for link in links(index) if ":" not in link]
    linked = {target.resolve().relative_to(ROOT).as_posix() for target in targets}
    missing = [name for name in DOCUMENTS if name not in linked and name != "docs/index.md" and not name.startswith("examples/")]
    assert not missing


def test_the_readme_shows_what_matters_within_two_screens() -> None:
    lines = text_of("README.md").splitlines()
    assert lines.index("## Links") <= 90
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings == [
        "Install",
        "Generate",
        "Build for your GPU",
        "Embed",
        "Links",
        "Serve",
        "In the tools that you use",
        "License",
    ]


def test_every_verb_and_option_is_documented() -> None:
    parts = re.split(r"^## ", text_of("docs/cli.md"), flags=re.MULTILINE)
    sections = {part.partition("\n")[0]: part for part in parts}
    parsers = make_parser()[1]
    assert set(parsers) <= set(sections)
    missing = []
    for verb, parser in parsers.items():
        described = " ".join(cells[0] for title in (verb, "Common to all verbs") for cells in rows(sections[title]))
        names = [name for action in parser._actions for name in action.option_strings]
        missing += [f"{verb} {name}" for name in names if not re.search(rf"`(\S+, )?{re.escape(name)}[` ]", described)]
    assert not missing


def test_every_key_of_a_recipe_is_documented() -> None:
    section = text_of("docs/cli.md").partition("## engines\n")[2].partition("\n## ")[0]
    described = " ".join(cell for cells in rows(section) for cell in cells)
    kinds = (recipe.Recipe, *recipe.SECTIONS.values())
    names = [field.name for kind in kinds for field in dataclasses.fields(kind) if not field.metadata.get("hidden")]
    names = [f"[{name}]" if name in recipe.SECTIONS else name for name in names]
    assert not [name for name in dict.fromkeys(names) if f"`{name}`" not in described.replace("[[build]]", "[build]")]


def test_every_parameter_of_a_request_is_documented() -> None:
    section = text_of("docs/python.md").partition("## Draw images\n")[2].partition("\n## ")[0]
    described = " ".join(cells[0] for cells in rows(section))
    assert not [field.name for field in dataclasses.fields(Request) if not re.search(rf"`{field.name}[`=]", described)]


def test_every_key_of_the_manifest_is_documented() -> None:
    text = text_of("docs/bundle.md")
    parts = [kind for kind in vars(manifest).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    assert manifest.Manifest in parts
    missing = [
        f"{kind.__name__}.{field.name}"
        for kind in parts
        for field in dataclasses.fields(kind)
        if not re.search(rf"`{field.name}`", text)
    ]
    assert f"| `format` | integer | {manifest.FORMAT}. " in text
    assert not missing


def test_every_graph_tensor_and_axis_is_documented() -> None:
    text = text_of("docs/bundle.md")
    names = [*GRAPHS, *DYNAMIC_AXES, *(t.name for graph in GRAPHS.values() for t in (*graph.inputs, *graph.outputs))]
    assert not [name for name in dict.fromkeys(names) if f"`{name}`" not in text]


@cache
def code_texts() -> str:
    """All literal text in the package, one piece a line."""
    texts = [
        node.value
        for path in sorted((ROOT / "sana_export").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join(texts)


def quoted_errors() -> list[str]:
    """The first cells of the tables in troubleshooting.md that quote what the program says."""
    cells = [cells[0] for cells in rows(text_of("docs/troubleshooting.md")) if cells[0] not in ("Symptom", "---")]
    spans = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    return [span for span in dict.fromkeys(spans) if " " in span and not re.match(r"pip |sana-export |steps\(|--", span)]


def quoted_refusals() -> list[str]:
    """What compatibility.md quotes as the message of a refusal."""
    return re.findall(r"(?:refused:|; with `--vae`:|only:) `([^`]+)`", text_of("docs/compatibility.md"))


@pytest.mark.parametrize(("find", "least"), [(quoted_errors, 50), (quoted_refusals, 20)])
def test_every_quoted_error_is_what_the_program_says(find: Callable[[], list[str]], least: int) -> None:
    quoted = find()
    assert len(quoted) > least
    unknown = [
        span
        for span in quoted
        if not all(piece.strip() in code_texts() for piece in span.split(PLACEHOLDER) if len(piece.strip()) > 3)
    ]
    assert not unknown
