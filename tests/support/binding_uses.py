"""What our code uses of TensorRT's Python modules, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sana_export.environment import PACKAGE

MODULE = "module"
#: The class of each object of TensorRT by the expression that our code has it in, for each file that has any.
OBJECTS: dict[str, dict[str, str]] = {
    "trt/build.py": {
        "module": MODULE,
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "error": "ParserError",
        "tensor": "ITensor",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "config.get_timing_cache()": "ITimingCache",
    },
    "trt/flavour.py": {"module": MODULE, "config": "IBuilderConfig"},
    "trt/logger.py": {"module": MODULE},
    "trt/progress.py": {"module": MODULE},
    "runtime/backends/tensorrt_engine.py": {
        "module": MODULE,
        "self._module": MODULE,
        "self._runtime": "Runtime",
        "self.engine": "ICudaEngine",
        "context": "IExecutionContext",
        "config": "IRuntimeConfig",
        "self._config": "IRuntimeConfig",
        "self._cache": "IRuntimeCache",
    },
    "runtime/backends/tensorrt_context.py": {"self._context": "IExecutionContext", "self._engine.engine": "ICudaEngine"},
    "runtime/backends/tensorrt_refit.py": {
        "module": MODULE,
        "self._module": MODULE,
        "engine": "ICudaEngine",
        "self._refitter": "Refitter",
        "prototype": "Weights",
        "prototypes[name]": "Weights",
    },
    "runtime/backends/weight_streaming.py": {"engine": "ICudaEngine"},
    "verify/layer_engines.py": {"network": "INetworkDefinition", "layer": "ILayer"},
    "bench/profile/tensorrt.py": {
        "trt": MODULE,
        "self._trt": MODULE,
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "bound.context": "IExecutionContext",
        "inspector": "EngineInspector",
    },
    "bench/torch_engine.py": {"module": MODULE, "engine": "ICudaEngine", "context": "IExecutionContext"},
    "bench/gpu_check/rtx.py": {
        "module": MODULE,
        "config": "IBuilderConfig",
        "plan": "IHostMemory",
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "engine": "ICudaEngine",
        "module.Runtime(logger)": "Runtime",
        "bound.context": "IExecutionContext",
    },
}
#: Members of TensorRT's classes with an underscore that objects of other packages have too.
COMMON = {"get_shape", "infer_shapes", "num_layers"}
#: The backend's own options, which have the names of TensorRT-RTX's.
COMMON |= {"cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"}
#: Objects of our own classes in the same variables as TensorRT's elsewhere in a file: the file, the variable and its members.
OWN = {
    ("trt/build.py", "error"): {"message"},
    ("runtime/backends/tensorrt_refit.py", "engine"): {"refit", "own"},
    ("runtime/backends/tensorrt_refit.py", "self._refitter"): {"set_all", "set_some"},
}
#: How a use is read: a value, a call, an assignment, or a question for whether it is there.
VALUE, CALL, STORE, ASKED = "value", "call", "store", "asked"


@dataclass(frozen=True)
class Use:
    """One use of a member. `place` is its file and line."""

    #: The class, or `MODULE`.
    owner: str
    #: Its member; "" if the member's name is a variable.
    member: str
    #: `VALUE`, `CALL`, `STORE` or `ASKED`.
    kind: str
    #: The file and the line.
    place: str
    #: For a call: the number of positional arguments and the names of the others.
    arguments: tuple[int, tuple[str, ...]] = (0, ())


def uses(files: Mapping[str, Mapping[str, str]] = OBJECTS) -> list[Use]:
    """Every use in `files`."""
    return [use for file, objects in files.items() for use in uses_in(file, (PACKAGE / file).read_text("utf-8"), objects)]


def uses_in(file: str, source: str, objects: Mapping[str, str]) -> Iterator[Use]:
    """Every use in the `source` of a file whose expressions `objects` are TensorRT's, without members that all objects have."""
    return (use for use in _uses_in(file, source, dict(objects)) if not use.member.startswith("__"))


def _uses_in(file: str, source: str, known: dict[str, str]) -> Iterator[Use]:

    def owner(node: ast.AST) -> str | None:
        """The class of an expression. A member of a module is a class."""
        text = ast.unparse(node)
        if text in known:
            return known[text]
        if isinstance(node, ast.Attribute) and owner(node.value) == MODULE:
            return node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and owner(node.args[0]) == MODULE:
            return ast.literal_eval(node.args[1]) if isinstance(node.args[1], ast.Constant) else None
        return None

    def visit(node: ast.AST, call: ast.Call | None = None) -> Iterator[Use]:
        place = f"{file}:{getattr(node, 'lineno', 0)}"
        kind = owner(node.value) if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Attribute) and kind is not None and node.attr not in OWN.get((file, ast.unparse(node.value)), ()):
            how = STORE if isinstance(node.ctx, ast.Store) else CALL if call is not None else VALUE
            yield Use(kind, node.attr, how, place, _arguments(call) if call is not None else (0, ()))
        if isinstance(node, ast.Call):
            if (asks := ast.unparse(node.func)) in ("hasattr", "getattr") and (kind := owner(node.args[0])) is not None:
                name, optional = node.args[1], asks == "hasattr" or len(node.args) == 3
                yield Use(kind, name.value if isinstance(name, ast.Constant) else "", ASKED if optional else VALUE, place)
            yield from visit(node.func, node)
            for child in (*node.args, *node.keywords):
                yield from visit(child)
        elif isinstance(node, ast.Assign):
            yield from visit(node.value)
            for target in node.targets:
                yield from visit(target)
                if isinstance(node.value, ast.Attribute) and owner(node.value.value) == MODULE:
                    known[ast.unparse(target)] = node.value.attr
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    yield from visit(ast.parse(source))


def _arguments(call: ast.Call) -> tuple[int, tuple[str, ...]]:
    return len(call.args), tuple(keyword.arg or "**" for keyword in call.keywords)


def unknown(interfaces: Iterable[Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Where our code uses a name of TensorRT's classes in an expression that `OBJECTS` does not have."""
    kinds = [members for found in interfaces for members in found.values() if isinstance(members, dict)]
    names = {name for members in kinds for name in members if "_" in name and not name.startswith("_")} - COMMON
    seen = {(use.place, use.member) for use in uses()}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in names and (f"{file}:{node.lineno}", node.attr) not in seen:
                yield f"{file}:{node.lineno}: {ast.unparse(node)}"


def derived(source: str, objects: Mapping[str, str]) -> Iterator[tuple[str, set[str]]]:
    """The classes of TensorRT that classes in `source` derive from, each with the methods that the class defines."""
    modules = {text for text, kind in objects.items() if kind == MODULE}
    for node in ast.walk(ast.parse(source)):
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            if isinstance(base, ast.Attribute) and ast.unparse(base.value) in modules:
                yield base.attr, {child.name for child in node.body if isinstance(child, ast.FunctionDef)}


def problem(use: Use, interface: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What an interface lacks for `use`: "class.member", or that with the reason; None if it fits."""
    owner = use.member if use.owner == MODULE else use.owner
    if use.member == "":
        return None
    if owner not in interface:
        return owner
    member = interface[owner].get("__init__" if use.owner == MODULE else use.member)
    if use.owner == MODULE:
        return f"{owner}{_refusal(member, use)}" if use.kind == CALL and _refusal(member, use) else None
    if member is None:
        return f"{owner}.{use.member}"
    if use.kind == STORE and member != "read and write":
        return f"{owner}.{use.member} cannot be set"
    if use.kind == CALL and _refusal(member, use):
        return f"{owner}.{use.member}{_refusal(member, use)}"
    return None


def _refusal(signatures: Any, use: Use) -> str:
    """Why no signature takes the arguments of `use`. Empty if one does."""
    if not isinstance(signatures, list):
        return " is not a method"
    return "" if any(_takes(signature, *use.arguments) for signature in signatures) else f" does not take {use.arguments}"


def _takes(signature: str, positional: int, names: tuple[str, ...]) -> bool:
    """Whether a signature "(self: X, a: int, b: str = None) -> int" takes so many positional arguments and these names."""
    # The commas of "Tuple[int, int]" separate no parameters.
    inside = re.sub(r"\[[^\[\]]*\]", "", signature.rpartition(") -> ")[0][1:])
    parameters = [part.strip() for part in inside.split(",")]
    parameters = [part for part in parameters if part and part.partition(":")[0] != "self"]
    free = parameters[positional:]
    required = {part.partition(":")[0] for part in free if " = " not in part}
    return positional <= len(parameters) and required <= set(names) <= {part.partition(":")[0] for part in free}
