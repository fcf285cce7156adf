"""What a visitor sees while an image is drawn, as values of the page's outputs by their names. Knows no Gradio."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import time
from typing import Any

from PIL import Image

from sana_export.errors import Cancelled, SanaExportError
from sana_export.image_files import save_image
from sana_export.serve.demo.look import problem, progress, queued, times
from sana_export.serve.demo.stream import as_they_come
from sana_export.serve.demo.studio import Painting, Preview, Shown, Studio, Waiting, Wish

LOG = logging.getLogger(__name__)
#: Pixels of the longer side of a preview as it is sent. It has one pixel for each latent pixel.
_PREVIEW_SIDE = 256
#: Seconds after which a finished image is deleted, when the next one is finished.
KEEP_SECONDS = 3600

Update = dict[str, Any]


def wish_of(inputs: Mapping[str, Any]) -> Wish:
    """What the values of the page's inputs, by their names, ask for. An empty field means its default."""
    given = {name: value for name, value in inputs.items() if name != "new_seed" and value is not None}
    if inputs.get("new_seed"):
        given.pop("seed", None)
    return Wish(**{**given, "loras": tuple(given.get("loras", ()))})


def drawing_updates(studio: Studio, inputs: Mapping[str, Any], stop: threading.Event, files: Path) -> Iterator[Update]:
    """Draw what `inputs` ask for, and yield what changes on the page: the texts and images by name, and `busy`.

    files: the folder that finished images are written to. An error is a text on the page, and in the log. When `stop` is set, or
    the iterator is closed, the drawing ends at its next step.
    """
    finished: list[Painting] = []
    try:
        wish = wish_of(inputs)
        yield {"busy": True, "state": "Starting", "times": "", "image": None, "reference": None}
        draw: Callable[[Callable[[Shown], None]], None] = partial(studio.draw, wish, cancelled=stop.is_set)
        for shown in as_they_come(draw):
            if isinstance(shown, Waiting):
                yield {"state": queued(shown)}
            elif isinstance(shown, Preview):
                yield {"image": _enlarged(shown.image), "state": progress(shown)}
            else:
                finished.append(shown)
                yield _finished(finished, files, more=wish.compare and len(finished) == 1)
    except Cancelled:
        yield {"state": "Stopped"}
    except SanaExportError as error:
        LOG.warning("%s", error)
        yield {"state": problem(error, studio.settings.local)}
    except Exception as error:
        LOG.exception("drawing failed")
        yield {"state": problem(error, studio.settings.local)}
    finally:
        stop.set()
    yield {"busy": False}


def _finished(finished: list[Painting], files: Path, more: bool) -> Update:
    """The last of the finished images, and the times of all. `more`: another one is being drawn."""
    painting = finished[-1]
    _delete_old(files)
    path = files / f"sana-{painting.seed}{'-diffusers' if painting.reference else ''}.png"
    save_image(painting.image, path, painting.metadata or None)
    return {
        "reference" if painting.reference else "image": str(path),
        "state": "Drawing with eager diffusers" if more else f"Seed {painting.seed}",
        "times": times(finished),
        "seed": painting.seed,
    }


def _delete_old(files: Path) -> None:
    """Delete the images that are older than `KEEP_SECONDS`."""
    for path in files.glob("*.png"):
        with suppress(OSError):
            if time() - path.stat().st_mtime > KEEP_SECONDS:
                path.unlink()


def _enlarged(preview: Image.Image) -> Image.Image:
    """A preview at a size that browsers smooth well."""
    factor = max(1, _PREVIEW_SIDE // max(preview.size))
    return preview.resize((preview.width * factor, preview.height * factor), Image.Resampling.BICUBIC)
