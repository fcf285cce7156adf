"""The page: its inputs and outputs, and what happens when a visitor draws, stops or leaves. Imports Gradio."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
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
#: Shown from the click until the drawing has ended. The browser writes it, so it cannot come after "Stopped".
_STOPPING = "() => 'Stopping'"


@dataclass(eq=False)
class _Drawing:
    """The image that a visitor has asked for."""

    stop: threading.Event = field(default_factory=threading.Event)
    begun: bool = False


class DemoPage:
    """The page of a studio. Finished images are written to the folder `files`."""

    def __init__(self, studio: Studio, files: Path) -> None:
        self.studio, self.files = studio, files
        #: What each session waits for or draws: one image at a time.
        self._drawings: dict[str, _Drawing] = {}
        self._changing = threading.Lock()
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
        self.blocks.queue(api_open=False)

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
        """Connect the events.

        What a visitor sees of a drawing comes from `draw` alone, in its order, its end too. With Gradio's own way of stopping it
        (`cancels`), the answer to the click, the last steps, and `failure`, which Gradio then calls too, come in any order, and the
        last one stays on the page. For the same reason, the visitors take turns in the studio, not in Gradio's queue.
        """
        state, buttons = self._outputs["state"], [self._draw, self._stop]
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asked = gr.on([self._draw.click, self._inputs["prompt"].submit], self.wait, None, [state, *buttons], **at_once)
        drawing = asked.then(
            self.draw,
            list(self._inputs.values()),
            [*self._outputs.values(), *buttons],
            show_progress_on=self._outputs["image"],
            concurrency_limit=None,
            trigger_mode="multiple",  # the browser may not have noticed yet that the last one has ended
            api_visibility="private",
        )
        drawing.failure(self.refuse, None, [state, *buttons], **at_once)
        self._stop.click(None, None, state, js=_STOPPING, api_visibility="private")
        self._stop.click(self.stop, None, None, trigger_mode="multiple", **at_once)
        self.blocks.unload(self.leave)

    def wait(self, request: gr.Request) -> dict[Any, Any]:
        """A visitor asks for an image. One who has an image already keeps that one."""
        with self._changing:
            if _session(request) in self._drawings:
                return gr.skip()
            self._drawings[_session(request)] = _Drawing()
        return self._changes({"state": "Waiting", "busy": True})

    def refuse(self, request: gr.Request) -> dict[Any, Any]:
        """A drawing did not begin, because a value is out of its range: Gradio says which."""
        with self._changing:
            found = self._drawings.get(_session(request))
            if found is not None and found.begun:
                return gr.skip()
            self._drawings.pop(_session(request), None)
        return self._changes({"state": "Not drawn", "busy": False})

    def draw(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """A visitor draws: the changes of the page as they come."""
        with self._changing:
            mine = self._drawings.get(_session(request))
            if mine is None or mine.begun:
                return
            mine.begun = True
        try:
            inputs = dict(zip(self._inputs, values, strict=True))
            for update in drawing_updates(self.studio, inputs, mine.stop, self.files):
                if update.get("busy") is False:
                    self._forget(request, mine)  # before the visitor can ask again
                yield self._changes(update)
        finally:
            self._forget(request, mine)

    def stop(self, request: gr.Request) -> None:
        """A visitor stops the image: it ends at its next step, or leaves the queue, and `draw` says so."""
        if (found := self._drawings.get(_session(request))) is not None:
            found.stop.set()

    def leave(self, request: gr.Request) -> None:
        """A visitor closes the page."""
        self.stop(request)
        with self._changing:
            found = self._drawings.get(_session(request))
            if found is not None and not found.begun:  # it never will
                del self._drawings[_session(request)]

    def stop_all(self) -> None:
        """End every image at its next step."""
        for drawing in list(self._drawings.values()):
            drawing.stop.set()

    def _forget(self, request: gr.Request, drawing: _Drawing) -> None:
        with self._changing:
            if self._drawings.get(_session(request)) is drawing:
                del self._drawings[_session(request)]

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
