"""A stand-in for ComfyUI: only what our nodes touch, written from its documentation and from how it behaves. It is not ComfyUI.

It checks inputs, runs nodes in order, caches their outputs by their inputs, shows errors, interrupts, and keeps a list of loaded
models. `make test-comfyui` runs the same tests on the real one.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support.comfyui.run import Run, Workflow

Hook = Callable[[int, int, Any], None]
KINDS = ("models/loras", "input", "output")


class InterruptProcessingException(Exception):
    """What ends a run that the user interrupts."""


class LatentPreviewMethod(enum.Enum):
    NoPreviews = "none"
    Auto = "auto"


class ModelPatcher:
    """The part of ComfyUI's class that ours inherits."""

    def __init__(self, model: torch.nn.Module, load_device: torch.device, offload_device: torch.device, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size

    def model_size(self) -> int:
        return self.size

    def __del__(self) -> None:
        self.detach(unpatch_all=False)

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        return self.model


class StandIn:
    """The engine, and the state behind its modules."""

    real = False
    #: Where models are loaded. If it is a GPU, it has room for one model.
    device = torch.device("cpu")

    def __init__(self, root: Path) -> None:
        for kind in KINDS:
            (root / kind).mkdir(parents=True, exist_ok=True)
        self.root, self.nodes = root, dict(CORE_NODES)
        self.args = types.SimpleNamespace(preview_method=LatentPreviewMethod.NoPreviews, preview_size=512)
        self.folders = {"loras": [str(root / "models/loras")]}
        self.loaded: list[Any] = []
        self.interrupted = False
        self._hook: Hook = lambda value, total, preview: None
        self._cache: dict[str, tuple[Any, ...]] = {}

    def interrupt(self) -> None:
        self.interrupted = True

    def show_previews(self, shown: bool) -> None:
        self.args.preview_method = LatentPreviewMethod.Auto if shown else LatentPreviewMethod.NoPreviews

    def unload_models(self) -> None:
        self.free_memory(self.device)

    def free_memory(self, device: torch.device) -> None:
        """Unload the models of a device."""
        for model in [model for model in self.loaded if model.load_device == device]:
            self.loaded.remove(model)
            model.detach(True)

    def load_models_gpu(self, models: list[Any]) -> None:
        """Load models. One that is loaded is detached from its place in the list, and stays."""
        for model in models:
            if model in self.loaded:
                self.loaded.remove(model)
                model.detach(unpatch_all=False)
            if model.load_device.type != "cpu":
                self.free_memory(model.load_device)
            model.partially_load(model.load_device, 1e32, force_patch_weights=False)
            self.loaded.insert(0, model)

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise InterruptProcessingException

    def modules(self) -> dict[str, types.ModuleType]:
        """The modules that the nodes import."""
        engine = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total, self.current = total, 0

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                self.current, self.total = value, self.total if total is None else total
                engine._hook(self.current, self.total, preview)

            def update(self, value: int) -> None:
                self.update_absolute(self.current + value)

        def get_full_path(kind: str, name: str) -> str | None:
            return next((str(path) for folder in self.folders[kind] if (path := Path(folder, name)).is_file()), None)

        parts: dict[str, dict[str, Any]] = {
            "comfy": {},
            "comfy.model_management": {
                "load_models_gpu": self.load_models_gpu,
                "throw_exception_if_processing_interrupted": self.throw_exception_if_processing_interrupted,
                "get_torch_device": lambda: self.device,
                "intermediate_device": lambda: torch.device("cpu"),
                "soft_empty_cache": lambda: None,
            },
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.cli_args": {"args": self.args, "LatentPreviewMethod": LatentPreviewMethod},
            "folder_paths": {
                "models_dir": str(self.root / "models"),
                "add_model_folder_path": lambda kind, folder: self.folders.setdefault(kind, []).append(folder),
                "get_folder_paths": lambda kind: self.folders[kind],
                "get_filename_list": lambda kind: sorted(p.name for f in self.folders[kind] for p in Path(f).iterdir()),
                "get_full_path": get_full_path,
                "get_full_path_or_raise": get_full_path,
            },
        }
        modules = {name: types.ModuleType(name) for name in parts}
        for name, members in parts.items():
            vars(modules[name]).update(members)
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(modules[parent], own, modules[name])
        return modules

    def run(self, workflow: Workflow, *, interrupt_at: tuple[str, int] | None = None) -> Run:
        run, keys, outputs = Run(), {}, {}
        for name, node in workflow.items():
            if problem := self._problem(node):
                return Run(status="refused", node=name, message=problem)
        order = list(self._ordered(workflow))
        for name in order:
            keys[name] = self._key(workflow[name], keys)
        self._cache = {key: value for key, value in self._cache.items() if key in keys.values()}
        self.interrupted = False
        for name in order:

            def hook(value: int, total: int, preview: Any, name: str = name) -> None:
                self.throw_exception_if_processing_interrupted()
                run.progress.append((name, value, total))
                run.previews.extend([preview] if preview is not None else [])
                self.interrupted = interrupt_at == (name, value)

            self._hook = hook
            if keys[name] not in self._cache:
                try:
                    self.throw_exception_if_processing_interrupted()
                    run.executed.append(name)
                    with torch.inference_mode():
                        self._cache[keys[name]] = self._call(workflow[name], outputs, run)
                except InterruptProcessingException:
                    return Run("interrupted", run.executed, run.progress, run.previews, node=name)
                except Exception as error:  # any: ComfyUI shows every error at its node
                    return Run("error", run.executed, run.progress, run.previews, str(error), name)
            outputs[name] = self._cache[keys[name]]
        return run

    def _ordered(self, workflow: Workflow) -> Iterator[str]:
        """The nodes, each after those that it reads."""
        done: set[str] = set()
        while len(done) < len(workflow):
            for name, node in workflow.items():
                if name not in done and all(value[0] in done for value in node["inputs"].values() if isinstance(value, list)):
                    done.add(name)
                    yield name

    def _problem(self, node: dict[str, Any]) -> str | None:
        """What is wrong with a node's inputs."""
        kind = self.nodes[node["class_type"]]
        types_of = kind.INPUT_TYPES()
        for group in ("required", "optional"):
            for name, (wanted, *options) in types_of.get(group, {}).items():
                value, limits = node["inputs"].get(name), options[0] if options else {}
                if value is None:
                    if group == "required":
                        return f"Required input is missing: {name}"
                elif isinstance(wanted, list) and value not in wanted:
                    return f"Value not in list: {name}: {value!r} not in {wanted}"
                elif wanted in ("INT", "FLOAT") and not limits.get("min", value) <= value <= limits.get("max", value):
                    return f"Value {value} out of range: {name}"
        unknown = set(node["inputs"]) - {name for group in types_of.values() for name in group}
        if unknown:
            return f"unknown inputs: {unknown}"
        if not hasattr(kind, "VALIDATE_INPUTS"):
            return None
        valid = kind.VALIDATE_INPUTS(**{name: node["inputs"][name] for name in ("bundle",)})
        return None if valid is True else str(valid)

    def _key(self, node: dict[str, Any], keys: dict[str, str]) -> str:
        """What a node's outputs follow from."""
        kind = self.nodes[node["class_type"]]
        constants = {name: None if isinstance(value, list) else value for name, value in node["inputs"].items()}
        changed = kind.IS_CHANGED(**constants) if hasattr(kind, "IS_CHANGED") else None
        inputs = {name: [keys[value[0]], value[1]] if isinstance(value, list) else value for name, value in node["inputs"].items()}
        return json.dumps([node["class_type"], changed, inputs], sort_keys=True)

    def _call(self, node: dict[str, Any], outputs: dict[str, Any], run: Run) -> tuple[Any, ...]:
        kind = self.nodes[node["class_type"]]
        inputs = {name: outputs[value[0]][value[1]] if isinstance(value, list) else value for name, value in node["inputs"].items()}
        if kind is SaveImage:
            run.images.extend(saved(image) for image in inputs["images"])
            return ()
        call = getattr(kind() if kind is not LoadImage else kind(self.root), kind.FUNCTION)
        return tuple(call(**inputs))


@contextmanager
def installed(engine: StandIn) -> Iterator[None]:
    """Let programs import the stand-in as ComfyUI."""
    modules = engine.modules()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def saved(image: torch.Tensor) -> Any:
    """The pixels of the file that ComfyUI writes for an IMAGE [H, W, C]: truncated, not rounded."""
    return np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)


class SaveImage:
    FUNCTION = "save_images"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING",)}}


class LoadImage:
    FUNCTION = "load_image"

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"image": ("STRING",)}}

    def load_image(self, image: str) -> Any:
        pixels = np.asarray(Image.open(self.root / "input" / image).convert("RGB")).astype(np.float32) / 255
        return torch.from_numpy(pixels)[None], torch.zeros(1, 64, 64)


class SolidMask:
    FUNCTION = "solid"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"value": ("FLOAT", {}), "width": ("INT", {}), "height": ("INT", {})}}

    def solid(self, value: float, width: int, height: int) -> Any:
        return (torch.full((1, height, width), value),)


class MaskComposite:
    FUNCTION = "combine"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        names = {"destination": ("MASK",), "source": ("MASK",), "x": ("INT", {}), "y": ("INT", {}), "operation": (["add"],)}
        return {"required": names}

    def combine(self, destination: torch.Tensor, source: torch.Tensor, x: int, y: int, operation: str) -> Any:
        out = destination.clone()
        out[:, y : y + source.shape[1], x : x + source.shape[2]] += source
        return (out.clamp(0, 1),)


CORE_NODES = {kind.__name__: kind for kind in (SaveImage, LoadImage, SolidMask, MaskComposite)}
