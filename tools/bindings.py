"""Records the Python interface of TensorRT's versions, so that tests compare our uses with it without the network.

    python -m tools.bindings [FOLDER]

It downloads the wheels of the bindings alone, without TensorRT's libraries, and imports each in a process of its own. At import the
bindings look for a few C functions of these libraries: a stand-in that has them is compiled. Nothing of TensorRT runs. This needs
the network, a C compiler, and CPython under Linux. `tests/trt/test_bindings.py` reads the result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

#: What is recorded: the lowest and the highest version of TensorRT that we support. The tests ask TensorRT-RTX itself.
DISTRIBUTION, MODULE, VERSIONS = "tensorrt-cu13-bindings", "tensorrt_bindings", ("10.13.2.6", "11.4.0.106")
FOLDER = Path(__file__).parents[1] / "tests" / "trt" / "interfaces"
#: The classes and enumerations that our code uses.
CLASSES = (
    *("Builder", "BuilderFlag", "ComputeCapability", "CudaGraphStrategy", "DataType", "DynamicShapesKernelSpecializationStrategy"),
    *("EngineInvalidityDiagnostics", "EngineValidity", "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel"),
    *(
        "EngineInspector",
        "IBuilderConfig",
        "ICudaEngine",
        "IExecutionContext",
        "IHostMemory",
        "ILayer",
        "ILogger",
        "INetworkDefinition",
    ),
    *("IOptimizationProfile", "IProfiler", "IProgressMonitor", "IRuntimeCache", "IRuntimeConfig", "IStreamWriter", "ITensor"),
    *("ITimingCache", "LayerInformationFormat", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "PreviewFeature"),
    *("ProfilingVerbosity", "Refitter", "Runtime", "Weights"),
)
#: The functions that the bindings look for at import.
FUNCTIONS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry", "getNvOnnxParserVersion"),
    *("getPluginRegistry", "initLibNvInferPlugins"),
)


def describe(module: Any) -> dict[str, dict[str, Any]]:
    """The members of `CLASSES` in `module`, by class.

    A property is "read" or "read and write", a member of an enumeration its number, and a method the list of its signatures.
    """
    kinds = {name: getattr(module, name) for name in CLASSES if hasattr(module, name)}
    return {name: _members(kind) for name, kind in {**kinds, "ILogger.Severity": module.ILogger.Severity}.items()}


def _members(kind: Any) -> dict[str, Any]:
    if hasattr(kind, "__members__"):
        return {name: int(member) for name, member in kind.__members__.items()}
    found: dict[str, Any] = {}
    for name in ("__init__", *dir(kind)):
        value = getattr(kind, name)
        if isinstance(value, property):
            found[name] = "read" if value.fset is None else "read and write"
        elif name == "__init__" or not name.startswith("_"):
            found[name] = _signatures(name, value.__doc__ or "") if callable(value) and not isinstance(value, type) else "class"
    return found


def _signatures(name: str, text: str) -> list[str]:
    """The signatures that a docstring of pybind11 begins with or counts, without the names of modules."""
    lines = re.findall(rf"^(?:\d+\. )?{name}(\(.*\) -> .*)$", text, re.MULTILINE)
    return [re.sub(r"\b(?:\w+\.)+(?=\w)", "", line) for line in lines if not line.startswith("(*args, **kwargs)")]


def write_interface(name: str, path: str) -> None:
    """Import the module `name` and write its version and what `describe` says of it to a file."""
    module = importlib.import_module(name)
    interface = {"version": module.__version__, **describe(module)}
    Path(path).write_text(json.dumps(interface, indent=1, sort_keys=True) + "\n", "utf-8")


def record(version: str, folder: Path) -> Path:
    """Download the wheel of `version`, import its module and write the interface to a file in `folder`."""
    path = folder / f"tensorrt-{'.'.join(version.split('.')[:2])}.json"
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", place]
        subprocess.run([*pip, f"{DISTRIBUTION}=={version}"], check=True)
        (wheel,) = here.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(here)
        _compile_libraries(here, next(here.glob(f"{MODULE}/*.so")))
        search = {"LD_LIBRARY_PATH": place, "PYTHONPATH": os.pathsep.join((place, str(Path(__file__).parents[1])))}
        code = "import sys; from tools.bindings import write_interface; write_interface(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", code, MODULE, str(path)], check=True, env={**os.environ, **search}, cwd=place)
    return path


def _compile_libraries(folder: Path, bindings: Path) -> None:
    """Stand-ins for the libraries that the shared object `bindings` is linked with."""
    source = folder / "functions.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in set(re.findall(rb"\0(libnv\w+\.so\.\d+)(?=\0)", bindings.read_bytes())):
        target = folder / name.decode()
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{target.name}", str(source), "-o", str(target)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the Python interface of TensorRT's versions.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where to write it (default: %(default)s)")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for version in VERSIONS:
        print(record(version, folder))


if __name__ == "__main__":
    main()
