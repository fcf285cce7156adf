"""Makes a synthetic checkpoint: a folder that diffusers and everything after it load as they load a published one."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sana_export.errors import DependencyError, UsageError
from sana_export.synth.recipes import RECIPES, SyntheticRecipe
from sana_export.synth.tokenizer import build_gemma_tokenizer
from sana_export.synth.weights import FILL

#: Written beside model_index.json; its presence means that the weights are random.
MARKER = "sana_export.json"
DTYPES = ("float32", "float16", "bfloat16")


def find_recipe(name: str) -> SyntheticRecipe:
    """The recipe `name`. Raises `UsageError` with the nearest names."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES) or list(RECIPES)
        raise UsageError("no such synthetic checkpoint", found=name, wanted=" or ".join(near))
    return RECIPES[name]


def build_pipeline(recipe: SyntheticRecipe, seed: int = 0) -> Any:
    """The recipe's `SanaPipeline` in float32 in memory. Leaves torch's global random state as it was."""
    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = build_gemma_tokenizer()
    text_config = Gemma2Config(**{"vocab_size": len(tokenizer), **recipe.text_encoder})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        models: dict[str, Any] = {
            "text_encoder": Gemma2Model(text_config),
            "transformer": SanaTransformer2DModel(**recipe.transformer),
            "vae": AutoencoderDC(**recipe.vae),
        }
        for component, model in models.items():
            FILL[component](model.eval(), seed)
    scheduler = DPMSolverMultistepScheduler(**recipe.scheduler)
    return SanaPipeline(tokenizer=tokenizer, scheduler=scheduler, **models)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing one on stderr for files that are written at once."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def write_pipeline(
    pipeline: Any,
    folder: Path,
    marker: dict[str, Any],
    *,
    dtype: str = "float32",
    variant: str | None = None,
) -> Path:
    """Write `pipeline` with its weights in `dtype` as the checkpoint `folder`, whole or not at all; return `folder`.

    `marker` is what `MARKER` will hold. An older synthetic checkpoint of that name is replaced; anything else there is kept
    and raises `UsageError`. A full disk or a missing permission raises `DependencyError`.
    """
    import torch
    from safetensors import SafetensorError

    if dtype not in DTYPES:
        raise UsageError("no such dtype for weights", found=dtype, wanted=", ".join(DTYPES))
    folder = Path(folder)
    if folder.exists() and not (folder / MARKER).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            "the folder holds something that is not a synthetic checkpoint",
            found=folder,
            wanted="a new folder",
            fix="choose another name or remove it yourself",
        )
    for component in ("text_encoder", "transformer", "vae"):
        # The plain `Module.to`: diffusers' own warns about layers to keep in float32, of which Sana has none.
        torch.nn.Module.to(getattr(pipeline, component), getattr(torch, dtype))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as scratch:
            fresh = Path(scratch, "fresh")
            with _no_progress_bar():
                pipeline.save_pretrained(fresh, safe_serialization=True, variant=variant)
            (fresh / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
            if folder.exists():
                folder.rename(Path(scratch, "old"))
            fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DependencyError(
            "the checkpoint could not be written",
            found=error,
            wanted=f"a writable disk with room for it at {folder.parent}",
        ) from error
    return folder


def make_checkpoint(
    recipe: str | SyntheticRecipe,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    variant: str | None = None,
) -> Path:
    """Write the synthetic checkpoint `recipe` to `folder` in diffusers' layout and return `folder`.

    The same recipe, dtype and seed give the same bytes. `dtype` is that of the stored weights ("float32", "float16",
    "bfloat16"); `variant` ("fp16") goes into their file names. See `write_pipeline` for what happens to an older folder.
    """
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    marker = {"synthetic": True, "recipe": recipe.name, "seed": seed}
    return write_pipeline(build_pipeline(recipe, seed), folder, marker, dtype=dtype, variant=variant)
