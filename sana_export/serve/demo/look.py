"""How the page looks: its theme, its CSS, and the parts of it that are HTML of our own. Nothing comes from another server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sana_export.errors import SanaExportError
from sana_export.manifest import Manifest
from sana_export.serve.demo.studio import Painting, Preview, Waiting

#: Stage to the color of its part of the bar. Any other is a step.
_COLORS = {"text encoder": "#6d8fb3", "context": "#9bb8c9", "decoder": "#d9a05b", "previews": "#c9c6bd", "other": "#e4e1d8"}
_STEPS = "#2f6f73"
#: Not counted when two pipelines are compared: only one of them shows previews.
_NOT_COMPARED = "previews"

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; padding: 1rem !important }
footer { display: none !important }
.gradio-container .main { padding: 0 !important }
.head h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; margin: 0 }
.head p { margin: .15rem 0 0; font-size: .9rem; color: var(--body-text-color-subdued) }
.columns { display: grid !important; gap: 1rem 1.75rem;
  grid-template: "ask results" "options results" 1fr / minmax(300px, 2fr) 3fr }
.columns > * { min-width: 0 !important }
.ask { grid-area: ask } .results { grid-area: results } .options { grid-area: options }
.form { background: transparent !important; border: 0 !important; box-shadow: none !important; gap: .9rem !important }
.picture { min-height: 12rem; background: rgb(120 113 108 / .08) !important; border-radius: .5rem }
.picture .image-frame, .picture .image-frame img { width: 100% !important; height: auto !important; object-fit: contain }
.picture .image-frame img { max-height: 72vh; border-radius: .5rem }
.picture .icon-button-wrapper, .picture label { border: 0; color: #44403c !important;
  background: rgb(255 255 255 / .85) !important }
.picture .icon-button-wrapper button { color: #44403c !important }
.state { font-size: .9rem; min-height: 1.4rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere }
.state .problem { display: block; padding: .6rem .8rem; border-radius: .5rem; background: #fbecea; color: #7a2b20 }
.dark .state .problem { background: #47231e; color: #f6cfc8 }
.track { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; margin-top: .35rem }
.track i { display: block; height: 100%; background: #2f6f73 }
.times { font-size: .85rem; font-variant-numeric: tabular-nums }
.times .run { display: grid; grid-template-columns: 1fr auto; gap: .1rem .75rem; margin-bottom: .6rem }
.times .bar { grid-column: 1 / 3; display: flex; height: 12px; border-radius: 6px; overflow: hidden; background: transparent }
.times .bar i { display: block; height: 100% }
.times ul { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; grid-column: 1 / 3; margin: .2rem 0 0; padding: 0;
  color: var(--body-text-color-subdued) }
.times li { margin: 0; white-space: nowrap }
.times li i { display: inline-block; width: .65rem; height: .65rem; border-radius: 2px; margin-right: .35rem }
.times .faster { margin: 0; color: var(--body-text-color) }
@media (max-width: 600px) {
  .columns { grid-template: "ask" "results" "options" / 1fr }
  .pictures { flex-direction: column !important }
  .picture .image-frame img { max-height: none }
}
"""


def theme() -> Any:
    """A calm theme with the fonts of the visitor's own system."""
    import gradio as gr

    made = gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="stone",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    return made.set(
        button_primary_background_fill=_STEPS,
        button_primary_background_fill_hover="#255a5d",
        button_primary_background_fill_dark=_STEPS,
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_text_color="*neutral_500",
        block_title_text_weight="500",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_background_fill="transparent",
        block_title_padding="0",
        body_background_fill="*neutral_50",
        block_background_fill="transparent",
        block_border_width="0px",
        block_padding="0",
        block_label_padding="*spacing_sm",
        input_border_width="1px",
        input_border_color="*neutral_200",
        input_shadow="none",
        input_background_fill="white",
        button_primary_shadow="none",
        button_secondary_shadow="none",
        button_large_text_weight="500",
        checkbox_background_color_selected=_STEPS,
        checkbox_border_width="1px",
        checkbox_border_color="*neutral_400",
        slider_color=_STEPS,
    )


def head(manifest: Manifest, backend: str, device: str) -> str:
    """What draws: the checkpoint, the precision, the backend."""
    side = manifest.model.native_size
    random = "random weights, " if manifest.checkpoint.synthetic else ""
    facts = f"{random}{manifest.options.precision}, {backend} on {device}, trained at {side} × {side} px"
    return f"<h1>{escape(manifest.checkpoint.source)}</h1><p>{escape(facts)}</p>"


def queued(waiting: Waiting) -> str:
    """The place in the queue."""
    return f"Waiting for {waiting.before} other {'image' if waiting.before == 1 else 'images'}"


def progress(preview: Preview) -> str:
    """How far an image is."""
    share = 100 * preview.step / preview.steps
    return f'Step {preview.step} of {preview.steps}<div class="track"><i style="width:{share:.0f}%"></i></div>'


def problem(error: Exception, local: bool) -> str:
    """An error in plain words.

    What a request did wrong is for everyone. Anything else names folders and commands of this machine: only `local` visitors see
    them, and others are told where it is written.
    """
    from sana_export.errors import UsageError

    if isinstance(error, UsageError):
        lines = [error.message[:1].upper() + error.message[1:] + "."]
        lines += [f"You gave: {error.found}." for _ in [0] if error.found is not None]
        lines += [f"Possible: {error.wanted}." for _ in [0] if error.wanted is not None]
        text = " ".join(lines)
    elif isinstance(error, SanaExportError) and local:
        text = str(error)
    else:
        text = "The image could not be drawn. The log of the server says why."
    return f'<span class="problem" role="alert">{escape(text)}</span>'


def times(paintings: Sequence[Painting]) -> str:
    """The seconds of each stage as one bar for each image, drawn to the same scale."""
    longest = max((sum(painting.seconds.values()) for painting in paintings), default=0.0) or 1.0
    bars = "".join(_run(painting.title, painting.seconds, longest) for painting in paintings)
    return f'<div class="times">{bars}{_faster(paintings)}</div>'


def _run(title: str, seconds: Mapping[str, float], longest: float) -> str:
    shown = {stage: value for stage, value in seconds.items() if value > 0}
    colors = {stage: _COLORS.get(stage, _STEPS) for stage in shown}
    bar = "".join(
        f'<i style="width:{100 * value / longest:.2f}%;background:{colors[stage]}"></i>' for stage, value in shown.items()
    )
    keys = "".join(
        f'<li><i style="background:{colors[stage]}"></i>{escape(stage)} {duration(value)}</li>' for stage, value in shown.items()
    )
    total = duration(sum(seconds.values()))
    return f'<div class="run"><span>{escape(title)}</span><b>{total}</b><div class="bar">{bar}</div><ul>{keys}</ul></div>'


def _faster(paintings: Sequence[Painting]) -> str:
    """How the first image's time compares with the second's, without previews, which the reference does not make."""
    if len(paintings) < 2:
        return ""
    own, other = (sum(value for stage, value in each.seconds.items() if stage != _NOT_COMPARED) for each in paintings[:2])
    ratio = f"{other / own:.2g} times as fast as" if other >= own else f"{own / other:.2g} times as slow as"
    note = "previews not counted. <code>sana-export bench</code> measures over many images."
    return f'<p class="faster">{ratio} eager diffusers for this image, {note}</p>'


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
