"""Every member, signature and enumeration of TensorRT that our code uses, in the oldest and newest versions that it supports.

The installed TensorRT-RTX is asked itself. `make bindings` recorded the interfaces of TensorRT from its real bindings.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from sana_export.environment import PACKAGE
from sana_export.formats.dtypes import DTYPES
from sana_export.trt.logger import LEVELS
from sana_export.trt.options import BUILDER_FLAGS, FLAGS, PREVIEW_FEATURES
from tests.support.binding_uses import ASKED, MODULE, OBJECTS, Use, derived, problem, unknown, uses, uses_in
from tools.bindings import CLASSES, FOLDER, VERSIONS, describe

INSTALLED = "installed"
RECORDED = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
#: Members that our code chooses by a variable, and those of them that it uses only if the module has them.
BY_NAME = {
    "BuilderFlag": [flag for flags in BUILDER_FLAGS.values() for flag in flags],
    "PreviewFeature": [],
    "DynamicShapesKernelSpecializationStrategy": ["LAZY", "EAGER", "NONE"],
    "DataType": [dtype.tensorrt for dtype in DTYPES.values()],
}
IF_THERE = {"BuilderFlag": FLAGS, "PreviewFeature": PREVIEW_FEATURES}
#: What TensorRT lacks and our code asks for before it uses it.
ASKED_FOR = {
    "ComputeCapability",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "Runtime.get_engine_validity",
}
#: What TensorRT lacks and our code uses only if it found one of these.
FOLLOWS = {
    "CudaGraphStrategy": "IRuntimeConfig.cuda_graph_strategy",
    "DynamicShapesKernelSpecializationStrategy": "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "EngineInvalidityDiagnostics": "Runtime.get_engine_validity",
    "EngineValidity": "Runtime.get_engine_validity",
    "IBuilderConfig.num_compute_capabilities": "ComputeCapability",
    "IBuilderConfig.set_compute_capability": "ComputeCapability",
    "IRuntimeCache": "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache": "IRuntimeConfig.create_runtime_cache",
}
#: All that each version lacks of what our code uses.
LACKS: dict[str, set[str]] = {
    INSTALLED: set(),
    "tensorrt-10.13": {*ASKED_FOR, *FOLLOWS},
    "tensorrt-11.4": {*ASKED_FOR, *FOLLOWS},
}


def interface(version: str) -> dict[str, Any]:
    if version != INSTALLED:
        return json.loads(RECORDED[version].read_text("utf-8"))
    return describe(pytest.importorskip("tensorrt_rtx"))


def used(version: str) -> list[Use]:
    """What our code uses with this version: `bench/gpu_check/rtx.py` is for TensorRT-RTX alone."""
    return [use for use in uses() if version == INSTALLED or not use.place.startswith("bench/gpu_check/rtx.py:")]


@pytest.mark.parametrize("version", LACKS)
def test_a_version_has_what_our_code_uses(version: str) -> None:
    members = interface(version)
    assert {found for use in used(version) if (found := problem(use, members)) is not None} == LACKS[version]


def test_our_code_asks_for_what_a_version_lacks() -> None:
    assert {f"{use.owner}.{use.member}".removeprefix("module.") for use in uses() if use.kind == ASKED} >= ASKED_FOR
    assert set(FOLLOWS.values()) <= ASKED_FOR


def test_no_use_is_overlooked() -> None:
    assert list(unknown(interface(version) for version in LACKS)) == []


@pytest.mark.parametrize("version", LACKS)
def test_a_version_has_the_members_that_are_chosen_by_a_variable(version: str) -> None:
    members = interface(version)
    assert {use.owner for use in uses() if not use.member} == BY_NAME.keys()
    assert {f"{kind}.{name}" for kind, names in BY_NAME.items() for name in names if name not in members.get(kind, names)} == set()
    assert set(members["ILogger.Severity"]) == set(LEVELS)


@pytest.mark.parametrize(("kind", "names"), IF_THERE.items())
def test_what_is_set_if_it_is_there_is_there_in_a_version(kind: str, names: tuple[str, ...]) -> None:
    assert set(names) <= {member for version in LACKS for member in interface(version)[kind]}


@pytest.mark.parametrize("version", LACKS)
def test_classes_that_derive_from_the_modules_define_its_methods(version: str) -> None:
    members = interface(version)
    found = [
        (base, methods)
        for file, objects in OBJECTS.items()
        for base, methods in derived((PACKAGE / file).read_text("utf-8"), objects)
    ]
    assert {base for base, _ in found} == {"ILogger", "IProfiler", "IProgressMonitor", "IStreamWriter"}
    for base, methods in found:
        wanted = {name for name, member in members[base].items() if isinstance(member, list) and name != "__init__"}
        assert wanted, base
        assert wanted <= methods, base


def test_what_is_recorded() -> None:
    assert {json.loads(path.read_text("utf-8"))["version"] for path in RECORDED.values()} == set(VERSIONS)
    assert {INSTALLED, *RECORDED} == set(LACKS)
    assert {use.owner for use in uses()} - {MODULE} <= set(CLASSES)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("config.set_flag(1)", None),
        ("config.set_flag(flag=1)", None),
        ("config.set_flag()", "IBuilderConfig.set_flag does not take (0, ())"),
        ("config.set_flag(1, 2)", "IBuilderConfig.set_flag does not take (2, ())"),
        ("config.set_flag(1, other=2)", "IBuilderConfig.set_flag does not take (1, ('other',))"),
        ("config.set_flags(1)", "IBuilderConfig.set_flags"),
        ("config.num_optimization_profiles = 1", "IBuilderConfig.num_optimization_profiles cannot be set"),
        ("config.profiling_verbosity = 1", None),
        ("config.profiling_verbosity()", "IBuilderConfig.profiling_verbosity is not a method"),
        ("module.BuilderFlag.FP12", "BuilderFlag.FP12"),
        ("flags = module.BuilderFlag; flags.FP12", "BuilderFlag.FP12"),
        ("module.Weights(1, 2, 3)", None),
        ("module.Weights(1, 2)", "Weights does not take (2, ())"),
        ("module.Nothing(1)", "Nothing"),
    ],
)
def test_a_use_that_does_not_fit_is_found(line: str, found: str | None) -> None:
    members = interface("tensorrt-11.4")
    problems = {problem(use, members) for use in uses_in("a.py", line, {"module": MODULE, "config": "IBuilderConfig"})}
    assert problems - {None} == ({found} - {None})
