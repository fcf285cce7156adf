"""The engine of a checkout of ComfyUI, in this process: its own validation, executor, cache, model management and nodes.

Only its server is left out; an object that records messages takes its place.
"""

from __future__ import annotations

import asyncio
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.comfyui.run import Run, Workflow


class Server:
    """Records what the executor sends to the page."""

    client_id, last_node_id, sockets_metadata = "test", None, {}  # ComfyUI reads it

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        self.messages.append((event, data))


class RealEngine:
    """A checkout's engine on the CPU, with its models, input and output in `root`."""

    real = True

    def __init__(self, checkout: Path, root: Path, pack: Path) -> None:
        sys.path.insert(0, str(checkout))
        import comfy.cli_args

        self._args = comfy.cli_args.args
        self._args.cpu, self._args.base_directory = True, str(root)
        for folder in ("models/loras", "input", "output", "temp", "custom_nodes"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        import execution
        import nodes

        asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        if not asyncio.run(nodes.load_custom_node(str(pack))):
            raise AssertionError("ComfyUI did not load the pack")
        self.root, self.nodes = root, nodes.NODE_CLASS_MAPPINGS
        self._server = Server()
        self._executor = execution.PromptExecutor(self._server)

    def interrupt(self) -> None:
        import comfy.model_management

        comfy.model_management.interrupt_current_processing()

    def show_previews(self, shown: bool) -> None:
        methods = type(self._args.preview_method)
        self._args.preview_method = methods.Auto if shown else methods.NoPreviews

    def unload_models(self) -> None:
        import comfy.model_management

        comfy.model_management.unload_all_models()

    def run(self, workflow: Workflow, *, interrupt_at: tuple[str, int] | None = None) -> Run:
        import comfy.model_management
        import comfy.utils
        import execution

        run, workflow = Run(), copy.deepcopy(workflow)  # ComfyUI writes into it, and gets a new one from its page
        self._server.messages.clear()
        self._forget_lists()
        valid, _, outputs, problems = asyncio.run(execution.validate_prompt("run", workflow, None))
        if not valid:
            node, found = next(iter(problems.items()))
            return Run(status="refused", node=node, message="; ".join(f"{e['message']}: {e['details']}" for e in found["errors"]))

        def hook(value: int, total: int, preview: Any, **_: Any) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            node = str(self._server.last_node_id)
            run.progress.append((node, value, total))
            run.previews.extend([preview] if preview is not None else [])
            if interrupt_at == (node, value):
                self.interrupt()

        comfy.utils.set_progress_bar_global_hook(hook)
        self._executor.execute(workflow, "run", {"client_id": "test"}, outputs)
        messages = [*self._executor.status_messages, *self._server.messages]
        run.executed = [data["node"] for event, data in messages if event == "executing" and data["node"] is not None]
        for event, data in self._executor.status_messages:
            if event in ("execution_error", "execution_interrupted"):
                run.status, run.node = event.removeprefix("execution_"), data["node_id"]
                run.message = data.get("exception_message", "").strip()
        run.images = list(self._images())
        return run

    def _images(self) -> Iterator[Any]:
        for event, data in self._server.messages:
            for image in data["output"].get("images", ()) if event == "executed" and data.get("output") else ():
                with Image.open(self.root / "output" / image["subfolder"] / image["filename"]) as file:
                    yield np.asarray(file)

    def _forget_lists(self) -> None:
        """ComfyUI keeps lists of files for a while; tests add files faster."""
        import folder_paths

        folder_paths.filename_list_cache.clear()
