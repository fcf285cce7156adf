"""Scripts of Polygraphy's commands for the graphs of a bundle, for POSIX shells and for Windows."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath

from sana_export.verify.polygraphy_package import RTX_VARIABLE, build_options

#: The files of each graph.
INPUTS, OUTPUTS = "inputs.json", "outputs.json"
#: Backend to the environment variables of its commands.
BACKENDS: dict[str, Mapping[str, str]] = {"tensorrt": {}, "tensorrt-rtx": {RTX_VARIABLE: "1"}}
#: How a bundle's engine is run. Our engines may not allocate while they run, so their memory comes from outside.
_RUN = ("--trt", "--model-type", "engine", "--allocation-strategy", "runtime")

#: The first lines of each script.
_USE = (
    "With the name of a graph as its argument: only that graph.",
    "The environment variable BUNDLE is the bundle's folder, if it has moved.",
)
_SURGEON = "Needs onnx-graphsurgeon (pip install onnx-graphsurgeon)."

Shapes = Mapping[str, Sequence[Sequence[int]]]


class BundleFile(str):
    """A path inside the bundle, with forward slashes."""


@dataclass(frozen=True)
class GraphCommands:
    """What the commands for one graph are made from."""

    #: The graph's name.
    graph: str
    #: The path of its ONNX file in the bundle.
    onnx: str
    #: Input to the shape of its saved values. Only inputs with a dynamic axis.
    shapes: Mapping[str, Sequence[int]]
    #: The same inputs to their minimum, optimum and maximum shapes in an engine.
    profile: Shapes
    #: Backend to the path of an engine in the bundle.
    engines: Mapping[str, str]
    #: Whether ONNX Runtime has kernels for the types of its weights.
    kernels: bool = True

    def inspect(self) -> list[str]:
        return ["polygraphy", "inspect", "model", BundleFile(self.onnx), "--show", "layers"]

    def compare(self, model: str, *options: str) -> list[str]:
        """Run a model on the saved inputs and compare its outputs with the saved ones."""
        saved = ["--load-inputs", f"{self.graph}/{INPUTS}", "--load-outputs", f"{self.graph}/{OUTPUTS}"]
        return ["polygraphy", "run", model, *saved, *options]

    def compare_engine(self, build: Sequence[str], options: Sequence[str]) -> list[str]:
        """The same with an engine that is built for the profile with the options `build`."""
        words = [*build]
        for index, kind in enumerate(("min", "opt", "max")):
            if self.profile:
                words += [f"--trt-{kind}-shapes", *(_shape(name, shapes[index]) for name, shapes in self.profile.items())]
        return self.compare(BundleFile(self.onnx), *words, *options)

    def compare_built(self, backend: str, options: Sequence[str]) -> list[str]:
        """The same with the bundle's engine for `backend`."""
        return self.compare(BundleFile(self.engines[backend]), *_RUN, *options)

    def reduce(self, check: Sequence[str]) -> list[str]:
        """Bisect the graph down to the first node for which `polygraphy run` with the options `check` fails."""
        shapes = ["--model-input-shapes", *(_shape(*item) for item in self.shapes.items())] if self.shapes else []
        reduced = ["-o", f"{self.graph}-reduced.onnx", "--mode", "bisect", "--no-reduce-inputs", *shapes]
        run = ["polygraphy", "run", "polygraphy_debug.onnx", "--load-inputs", f"{self.graph}/{INPUTS}", *check]
        return ["polygraphy", "debug", "reduce", BundleFile(self.onnx), *reduced, "--check", *run]


def _shape(name: str, shape: Sequence[int]) -> str:
    return f"{name}:[{','.join(map(str, shape))}]"


@dataclass(frozen=True)
class Script:
    """One script."""

    #: What it does, for its first line.
    purpose: str
    #: Environment variables.
    environment: Mapping[str, str]
    #: Graph to the words of its command.
    commands: Mapping[str, Sequence[str]]

    def _unknown(self, name: str) -> str:
        return f"no command for {name}, only for {', '.join(self.commands)}"

    def posix(self, bundle: Path) -> str:
        lines = ["#!/bin/sh", f"# {self.purpose}", *(f"# {line}" for line in _USE), 'cd "$(dirname "$0")" || exit 2']
        lines += [f"BUNDLE=${{BUNDLE:-{shlex.quote(str(bundle))}}}"]
        lines += [f"export {name}={value}" for name, value in self.environment.items()]
        lines += [f'case ${{1:-}} in ""|{"|".join(self.commands)}) ;; *) echo "{self._unknown("$1")}" >&2; exit 2 ;; esac']
        lines += ["status=0"]
        for graph, words in self.commands.items():
            lines += [f"case ${{1:-{graph}}} in {graph}) {' '.join(map(_posix, words))} || status=1 ;; esac"]
        return "\n".join([*lines, "exit $status"]) + "\n"

    def windows(self, bundle: Path) -> str:
        lines = ["@echo off", f"rem {self.purpose}", *(f"rem {line}" for line in _USE), 'cd /d "%~dp0"']
        lines += [f'if not defined BUNDLE set "BUNDLE={bundle}"']
        lines += [f"set {name}={value}" for name, value in self.environment.items()]
        lines += ["set KNOWN=", *(f'if "%~1"=="{name}" set KNOWN=1' for name in ("", *self.commands))]
        lines += [f"if not defined KNOWN echo {self._unknown('%~1')} 1>&2 & exit /b 2", "set STATUS=0"]
        for graph, words in self.commands.items():
            lines += ['set "GRAPH=%~1"', f'if "%GRAPH%"=="" set "GRAPH={graph}"']
            lines += [f'if "%GRAPH%"=="{graph}" {" ".join(map(_windows, words))} || set STATUS=1']
        return "\r\n".join([*lines, "exit /b %STATUS%"]) + "\r\n"


def _posix(word: str) -> str:
    return f'"$BUNDLE"/{shlex.quote(word)}' if isinstance(word, BundleFile) else shlex.quote(word)


def _windows(word: str) -> str:
    return f'"%BUNDLE%\\{PureWindowsPath(word)}"' if isinstance(word, BundleFile) else word


def scripts(bundle: Path, graphs: Iterable[GraphCommands], limit: float, dtype: str) -> dict[str, str]:
    """File name to text. Those of ONNX Runtime leave out graphs that it lacks kernels for: all in bfloat16, and those with FP4.

    `limit` is the lowest signal-to-noise ratio in dB. Scripts without a command, such as those of engines that were not built, are
    left out.
    """
    by_name = {graph.graph: graph for graph in graphs}
    onnxruntime = [name for name, graph in by_name.items() if graph.kernels and dtype != "bfloat16"]

    def script(
        purpose: str, backend: str, command: Callable[[GraphCommands], Sequence[str]], names: Iterable[str] = tuple(by_name)
    ) -> Script:
        return Script(purpose, BACKENDS.get(backend, {}), {name: command(by_name[name]) for name in names})

    snr = ("--compare", "snr", "--snr-threshold", f"{limit:.1f}")
    table = {"inspect": script("Lists the layers of each graph.", "", GraphCommands.inspect)}
    table["onnxruntime"] = script(
        "Runs each graph in ONNX Runtime and compares it with its saved outputs.",
        "",
        lambda graph: graph.compare(BundleFile(graph.onnx), "--onnxrt", *snr),
        onnxruntime,
    )
    table["reduce-onnxruntime"] = script(
        f"Bisects each graph down to the first node whose output is not finite. {_SURGEON}",
        "",
        lambda graph: graph.reduce(("--onnxrt", "--validate")),
        onnxruntime,
    )
    for backend in BACKENDS:
        build = build_options(backend)
        table[backend] = script(
            "Builds an engine of each graph and compares it with the graph's saved outputs.",
            backend,
            partial(GraphCommands.compare_engine, build=build, options=snr),
        )
        table[f"reduce-{backend}"] = script(
            f"Bisects each graph down to the first node for which an engine differs from ONNX Runtime. {_SURGEON}",
            backend,
            partial(GraphCommands.reduce, check=(*build, "--onnxrt", *snr)),
            onnxruntime,
        )
        table[f"engines-{backend}"] = script(
            "Compares the bundle's engines with the saved outputs.",
            backend,
            partial(GraphCommands.compare_built, backend=backend, options=snr),
            [name for name, graph in by_name.items() if backend in graph.engines],
        )
    kinds = {".sh": Script.posix, ".cmd": Script.windows}
    return {
        f"{name}{end}": text(script, bundle) for name, script in table.items() if script.commands for end, text in kinds.items()
    }
