"""The page: its inputs and outputs, and what happens when a visitor draws, stops or leaves. Imports Gradio."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sana_export.serve.demo.look import head
from sana_export.serve.demo.studio import MOST_SEED, Studio
from sana_export.serve.demo.updates import Update, drawing_updates

#: Seconds between two searches for old image files, and the age at which they are deleted.
_DELETE_FILES = (600, 3600)
#: The largest guidance scale and PAG scale that the sliders offer.
_MOST_GUIDANCE, _MOST_PAG = 20, 10


class DemoPage:
    """The page of a studio. Finished images are written to the folder `files`."""

    def __init__(self, studio: Studio, files: Path) -> None:
        self.studio, self.files = studio, files
        #: Stops the image that a session draws.
        self._stops: dict[str, threading.Event] = {}
        with gr.Blocks(title="Sana", analytics_enabled=False, delete_cache=_DELETE_FILES) as self.blocks:
            gr.HTML(head(studio.manifest, studio.backend, studio.device), elem_classes="head")
            with gr.Row(elem_classes="columns"):
                with gr.Column(elem_classes="ask"):
                    prompt, self._draw, self._stop = self._ask()
                with gr.Column(elem_classes="results"):
                    self._outputs = self._results()
                with gr.Column(elem_classes="options"):
                    #: The inputs by the names of `Wish`.
                    self._inputs = {"prompt": prompt, **self._numbers(), **self._options()}
            self._outputs["seed"] = self._inputs["seed"]
            self._listen()
        self.blocks.queue(max_size=studio.settings.limits.waiting, api_open=False)

    def _ask(self) -> tuple[Any, Any, Any]:
        """The prompt and the buttons to draw and to stop."""
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, placeholder="A red fox in the snow", elem_id="prompt")
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
            stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="stop")
        return prompt, draw, stop

    def _numbers(self) -> dict[str, Any]:
        """The inputs that every bundle has."""
        model, most = self.studio.manifest.model, self.studio.settings.limits.steps
        slider = partial(gr.Slider, buttons=[])
        side = partial(slider, *self.studio.sides, model.native_size, step=32, precision=0)
        with gr.Row():
            inputs: dict[str, Any] = {"width": side(label="Width"), "height": side(label="Height")}
        with gr.Row():
            inputs["steps"] = slider(1, most, min(model.default_steps, most), step=1, precision=0, label="Steps")
            inputs["guidance_scale"] = slider(1, _MOST_GUIDANCE, model.default_guidance_scale, step=0.1, label="Guidance")
        with gr.Row():
            inputs["seed"] = gr.Number(label="Seed", precision=0, minimum=0, maximum=MOST_SEED, elem_id="seed")
            inputs["new_seed"] = gr.Checkbox(True, label="New seed for each image", elem_id="new-seed")
        return inputs

    def _options(self) -> dict[str, Any]:
        """The inputs that only some bundles and pages have."""
        studio, found = self.studio, dict[str, Any]()
        if not studio.manifest.model.guidance_embeds:
            found["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=4)
        if studio.manifest.options.pag_layers:
            found["pag_scale"] = gr.Slider(0, _MOST_PAG, 0, step=0.1, buttons=[], label="Perturbed attention guidance (PAG)")
        if studio.loras:
            found["loras"] = gr.CheckboxGroup(list(studio.loras), label="LoRA")
        if len(studio.backends) > 1:
            found["backend"] = gr.Dropdown(studio.backends, value=studio.backend, label="Backend")
        if studio.reference is not None:
            found["compare"] = gr.Checkbox(False, label="Also draw with eager diffusers", elem_id="compare")
        return found

    def _results(self) -> dict[str, Any]:
        """The outputs by the names of `drawing_updates`."""
        image = partial(gr.Image, interactive=False, elem_classes="picture")
        with gr.Row(elem_classes="pictures"):
            own = image(label="Image", buttons=["download", "fullscreen"], elem_id="image")
            other = image(
                label="Eager diffusers", buttons=["fullscreen"], elem_id="reference", visible=self.studio.reference is not None
            )
        state = gr.HTML("", elem_classes="state", elem_id="state")
        return {"image": own, "reference": other, "state": state, "times": gr.HTML("", elem_id="times")}

    def _listen(self) -> None:
        """Connect the events. One image is drawn at a time; the others see their place in the queue."""
        buttons = [self._draw, self._stop]
        outputs, state = [*self._outputs.values(), *buttons], [self._outputs["state"], *buttons]
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asked = gr.on([self._draw.click, self._inputs["prompt"].submit], self.wait, None, state, **at_once)
        drawing = asked.then(
            self.draw,
            list(self._inputs.values()),
            outputs,
            show_progress_on=self._outputs["image"],
            concurrency_limit=1,
            api_visibility="private",
        )
        drawing.failure(self.refuse, None, state, **at_once)
        stopped = self._stop.click(self.stop, None, state, cancels=drawing, **at_once)
        stopped.then(self.stopped, None, state, **at_once)  # the last step may have arrived after the first answer
        self.blocks.unload(self.leave)

    def wait(self) -> dict[Any, Any]:
        """A visitor asks for an image."""
        return self._changes({"state": "Waiting", "busy": True})

    def refuse(self) -> dict[Any, Any]:
        """The queue is full, or a value is out of its range: Gradio says which."""
        return self._changes({"state": "Not drawn", "busy": False})

    def draw(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """A visitor draws: the changes of the page as they come."""
        stop = self._stops[_session(request)] = threading.Event()
        for update in drawing_updates(self.studio, dict(zip(self._inputs, values, strict=True)), stop, self.files):
            yield self._changes(update)

    def stop(self, request: gr.Request) -> dict[Any, Any]:
        """A visitor stops the image, which may still be in the queue."""
        self.leave(request)
        return self.stopped()

    def stopped(self) -> dict[Any, Any]:
        """What the page shows after a stop."""
        return self._changes({"state": "Stopped", "busy": False})

    def leave(self, request: gr.Request) -> None:
        """A visitor closes the page: what is drawn for nobody ends at its next step."""
        if (stop := self._stops.pop(_session(request), None)) is not None:
            stop.set()

    def stop_all(self) -> None:
        """End every image at its next step."""
        for stop in list(self._stops.values()):
            stop.set()

    def _changes(self, update: Update) -> dict[Any, Any]:
        """An update as Gradio takes it: new values by component."""
        changes = {self._outputs[name]: value for name, value in update.items() if name != "busy"}
        if "busy" in update:
            changes |= {
                self._draw: gr.update(interactive=not update["busy"]),
                self._stop: gr.update(interactive=update["busy"]),
            }
        return changes


def _session(request: gr.Request) -> str:
    return str(request.session_hash)
