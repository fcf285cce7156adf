"""`generate --prompts-file`: draws the images of a file with prompts that are not in the folder yet."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.adapters import Lora
from sana_export.cli.drawn_images import FILE_NAME, DrawnImages, State
from sana_export.cli.images import check_writable, output_type
from sana_export.cli.prompts_file import BadLine, Item, check_file, check_values, read_items
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.text import plural, seconds
from sana_export.cli.verb import Answer
from sana_export.errors import SanaExportError, UsageError, first_line
from sana_export.image_files import FORMATS, SUFFIXES, check_quality
from sana_export.manifest import Manifest
from sana_export.runtime.metadata import lora_document
from sana_export.runtime.request import Request

if TYPE_CHECKING:
    from sana_export.runtime import SanaRuntime

log = logging.getLogger(__name__)

#: Failures that the answer names. The index of a long file would not fit.
MOST_FAILURES = 100


@dataclass(frozen=True)
class FileRun:
    """What `generate --prompts-file` was asked for."""

    bundle: Path
    prompts_file: Path
    folder: Path
    #: Words of a request for lines that do not have them, without a seed.
    defaults: Mapping[str, Any]
    seed: int | None
    loras: Sequence[Lora]
    #: The word of the format in `FORMATS`.
    format: str
    quality: int | None
    #: Whether the files say how they were drawn.
    metadata: bool
    batch: int

    def check(self) -> None:
        """Raise UsageError for files and options that do not fit. Loads nothing."""
        check_file(self.prompts_file)
        check_quality(self.format, self.quality)
        if self.folder.suffix.lower() in SUFFIXES or (self.folder.exists() and not self.folder.is_dir()):
            raise UsageError(
                "--prompts-file writes a folder of images",
                found=f"-o {self.folder}",
                wanted="the name of a folder, and --output-format for the kind of images",
                fix=shlex.join(
                    ["-o", str(self.folder.with_suffix("")), "--output-format", SUFFIXES.get(self.folder.suffix.lower(), "png")]
                ),
            )
        # Lines of JSON may have images of their own, for which the options are defaults.
        check_values({"prompt": "", "seed": self.seed, **self.defaults}, alone=self.prompts_file.suffix.lower() == ".txt")
        check_writable(self.folder, self.folder)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an image's file, beside its words."""
        checkpoint = (manifest := Manifest.load(self.bundle)).checkpoint
        return {
            "model": [checkpoint.sha256, manifest.options.precision],
            "loras": [lora_document(lora) for lora in self.loras],
            "format": self.format,
            "quality": self.quality,
            "metadata": self.metadata,
        }


@dataclass
class FileCounts:
    """Counts of a run."""

    drawn: int = 0
    kept: int = 0
    failed: int = 0
    exit_code: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, file: Path, line: int, error: SanaExportError) -> None:
        """Report a line that cannot be drawn."""
        log.error("%s, line %d: %s", file.name, line, error)
        self.failed += 1
        self.exit_code = max(self.exit_code, error.exit_code)
        if len(self.failures) < MOST_FAILURES:
            self.failures.append({"line": line, **error.as_json()})


def draw_file(run: FileRun, load: Callable[[], contextlib.AbstractContextManager[SanaRuntime]], console: Console) -> Answer:
    """Draw what is missing. `load` loads the runtime, which is not done if nothing is missing.

    Raises UsageError before anything is drawn if images in the folder come from other lines or options. A line that cannot be drawn
    is reported, and the answer's exit code is that of its error.
    """
    settings, started, counts = run.settings, time.monotonic(), FileCounts()

    def on_wait() -> None:
        log.warning("another process draws into %s: waiting for it", run.folder)

    with DrawnImages.open(run.folder, run.format, run.seed, on_wait) as folder:
        missing = _count_missing(run, folder, settings, counts)
        if missing:
            with load() as runtime:
                _draw(run, runtime, folder, settings, missing, counts, console)
    return _answer(run, folder.seed, counts, time.monotonic() - started)


def _count_missing(run: FileRun, folder: DrawnImages, settings: Mapping[str, Any], counts: FileCounts) -> int:
    """Report the bad lines and count the images that are missing. Raises UsageError if others are in their place."""
    missing, others = 0, 0
    first: tuple[Item, State] | None = None
    for item in read_items(run.prompts_file, run.defaults, folder.seed):
        if isinstance(item, BadLine):
            counts.fail(run.prompts_file, item.line, item.error)
            continue
        state = folder.state(item.stem, item.key(settings))
        if state is State.EDITED:
            log.warning("%s was changed after it was drawn: delete it to draw it again", folder.path(item.stem))
        missing += state is State.MISSING
        counts.kept += state in (State.DRAWN, State.EDITED)
        if state in (State.OTHER, State.FOREIGN):
            others += 1
            first = first or (item, state)
    if first is not None:
        item, state = first
        raise UsageError(
            f"{plural(others, 'image')} in {run.folder} would be replaced by others",
            found=f"{folder.path(item.stem).name}, which "
            + ("was drawn from another line or with other options" if state is State.OTHER else f"is not in {FILE_NAME}"),
            wanted="the same prompts file and options as before, or another folder",
            fix=shlex.join(["-o", f"{run.folder}-2"])
            + f", or delete the files to draw them again: {shlex.join(['rm', str(folder.path(item.stem))])}",
        )
    return missing


def _draw(
    run: FileRun,
    runtime: SanaRuntime,
    folder: DrawnImages,
    settings: Mapping[str, Any],
    missing: int,
    counts: FileCounts,
    console: Console,
) -> None:
    """Draw and write the missing images in the order of the file."""
    log.info("drawing %d images on %s", missing, runtime.backend.name)
    waiting: deque[tuple[Item, str]] = deque()

    def requests() -> Iterator[Request]:
        for item in read_items(run.prompts_file, run.defaults, folder.seed):
            if isinstance(item, Item) and folder.state(item.stem, key := item.key(settings)) is State.MISSING:
                try:
                    request = Request(**item.words, output_type=output_type(run.format))
                except UsageError as error:  # its image cannot be read
                    counts.fail(run.prompts_file, item.line, error)
                    continue
                waiting.append((item, key))
                yield request

    started = time.monotonic()
    console.step("drawing", 0, missing)
    with contextlib.closing(runtime.generate_many(requests(), batch_size=run.batch, return_errors=True)) as results:
        for done, result in enumerate(results, 1):
            item, key = waiting.popleft()
            if isinstance(result, SanaExportError):
                counts.fail(run.prompts_file, item.line, result)
            else:
                metadata = dict(result.metadata[0])
                folder.write(item.stem, key, item.line, result.images[0], metadata, run.quality, carry=run.metadata)
                counts.drawn += 1
            console.step(f"drawing, {speed(done, missing, time.monotonic() - started)}", done, missing)


def speed(done: int, total: int, elapsed: float) -> str:
    """The rate and the time that is left: "3.1 images/s, 2 min 05 s left"."""
    each = max(elapsed, 1e-9) / done
    rate = f"{1 / each:.1f} images/s" if each < 1 else f"{seconds(each)} per image"
    return f"{rate}, {seconds((total - done) * each)} left"


def _answer(run: FileRun, seed: int, counts: FileCounts, elapsed: float) -> Answer:
    document = {
        "folder": str(run.folder),
        "index": str(run.folder / FILE_NAME),
        "prompts_file": str(run.prompts_file),
        "format": FORMATS[run.format].suffixes[0].removeprefix("."),
        "seed": seed,
        "drawn": counts.drawn,
        "kept": counts.kept,
        "failed": counts.failed,
        "failures": counts.failures,
        "seconds": elapsed,
    }
    lines = [str(run.folder), f"  {plural(counts.drawn, 'image')} drawn in {seconds(elapsed)}, seed {seed}"]
    if counts.kept:
        lines.append(f"  {plural(counts.kept, 'image')} drawn before")
    if counts.failed:
        named = [f"line {failure['line']} ({first_line(failure['message'])})" for failure in counts.failures[:3]]
        lines.append(f"  {counts.failed} not drawn: {'; '.join(named)}{'; ...' if counts.failed > 3 else ''}")
    return Answer(document, "\n".join(lines), counts.exit_code)
