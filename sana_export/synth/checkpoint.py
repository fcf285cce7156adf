"""Makes a synthetic checkpoint: a folder that diffusers loads like a published one, with random weights.

A checkpoint of any size is written in bounded memory. The networks are built on torch's meta device, which gives the names and
shapes of their parameters, and every parameter is drawn and written in pieces.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.controlnets import CONTROLNETS
from sana_export.errors import DependencyError, UsageError
from sana_export.files import require_free
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.output_folder import OutputFolder
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.synth.recipes import AUTOENCODER_RECIPES, RECIPES, SyntheticRecipe, recipe_with_decoder
from sana_export.synth.shards import StoredWeights
from sana_export.synth.tokenizer import build_gemma_tokenizer
from sana_export.synth.weights import RandomWeights, fill
from sana_export.user_paths import user_path
from sana_export.variants import INDEX, find_variant

if TYPE_CHECKING:
    from torch import Tensor

#: The file next to model_index.json that marks a checkpoint with random weights.
MARKER = "sana_export.json"
#: The stem of the names of each network's weight files.
STEMS = {"text_encoder": "model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
#: Default size limit of a weight file, in bytes.
SHARD_SIZE = 2 * 10**9
#: Size of everything except the weights, rounded up.
_SMALL_FILES = 10**6

#: Gives the values of a parameter by its name: flat, in pieces.
Values = Callable[[str], "Iterable[Tensor]"]


def find_recipe(name: str) -> SyntheticRecipe:
    """The recipe of the variant `name` (an alias or a hub id). Raises UsageError, with similar aliases, if there is none."""
    variant = find_variant(name)
    if variant is None:
        near = difflib.get_close_matches(name.lower(), RECIPES, n=4) or list(RECIPES)
        raise UsageError("no such variant", found=name, wanted=" or ".join(near), fix="sana-export variants")
    if variant.alias not in RECIPES:
        raise UsageError(
            f"{variant.alias} is trained: its weights are part of sana_export",
            found=name,
            wanted="a checkpoint without weights of its own, for example tiny-random",
            fix="sana-export synth tiny-random -o tiny-random",
        )
    return RECIPES[variant.alias]


def build_pipeline(recipe: SyntheticRecipe, seed: int = 0, *, hot: bool = False) -> Any:
    """The recipe's pipeline in float32, in memory. `hot`: as in `make_checkpoint`. torch's global random state does not change."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        pipeline = _assemble(recipe, "cpu")
        for component in STEMS:
            fill(getattr(pipeline, component).eval(), component, seed, hot=hot)
    return pipeline


def _assemble(recipe: SyntheticRecipe, device: str) -> Any:
    """The recipe's pipeline with its networks on `device` and the initial weights of their classes."""
    import diffusers
    import torch
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = build_gemma_tokenizer()
    text_config = Gemma2Config(**{"vocab_size": len(tokenizer), **recipe.text_encoder})
    scheduler = dict(recipe.scheduler)
    with torch.device(device):
        networks = {
            "text_encoder": Gemma2Model(text_config),
            "transformer": diffusers.SanaTransformer2DModel(**recipe.transformer),
            "vae": diffusers.AutoencoderDC(**recipe.vae),
        }
    return getattr(diffusers, recipe.pipeline)(
        tokenizer=tokenizer, scheduler=getattr(diffusers, scheduler.pop("_class_name"))(**scheduler), **networks
    )


def make_checkpoint(
    recipe: str | SyntheticRecipe,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    variant: str | None = None,
    shard_size: int = SHARD_SIZE,
    vae: str | None = None,
    hot: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Path:
    """Write the synthetic checkpoint `recipe` to `folder` in diffusers' layout and return `folder`.

    The same recipe, dtype, seed and shard size give the same bytes. `dtype` is that of the stored weights ("float32", "float16",
    "bfloat16"). `variant` ("fp16") becomes part of the weight files' names. `vae` is the autoencoder's decoder (a row of
    autoencoders.DECODERS; None: the published one). `hot` gives the weights heavy tails and the activations outlier channels, as
    published ones have (synth/heat.py). A weight file has at most `shard_size` bytes, unless a single tensor is larger. This needs
    the memory of a few pieces of `weights.PIECE` values. An existing folder is treated as by `write_pipeline`, which also has the
    errors.
    """
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    _check_request(folder, dtype)
    pipeline = _assemble(recipe if vae is None else recipe_with_decoder(recipe, vae), "meta")
    shapes = {component: shapes_of(getattr(pipeline, component)) for component in STEMS}
    values = {component: RandomWeights(component, shapes[component], seed, hot).pieces for component in STEMS}
    marker = {"synthetic": True, "variant": recipe.name, "dtype": dtype, "seed": seed}
    marker |= ({"vae": vae} if vae else {}) | ({"hot": True} if hot else {})
    return write_pipeline(
        pipeline, folder, marker, dtype=dtype, variant=variant, shard_size=shard_size, values=values, on_progress=on_progress
    )


def make_autoencoder(
    alias: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    hot: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Path:
    """Write the autoencoder `alias` (a row of autoencoders.AUTOENCODERS) to `folder`, for `--vae`, and return `folder`.

    It consists of config.json and the weights. They are those of the autoencoder of a checkpoint with the same config and seed. The
    other parameters and the errors are those of `make_checkpoint`.
    """
    return _make_network(
        "vae",
        "AutoencoderDC",
        AUTOENCODER_RECIPES[alias],
        {"autoencoder": alias},
        folder,
        dtype,
        seed,
        shard_size,
        hot,
        on_progress,
    )


def make_controlnet(
    alias: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    hot: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Path:
    """Write the ControlNet `alias` (a row of controlnets.CONTROLNETS) to `folder`, for `--controlnet`, and return `folder`.

    Its output layers are random too, which are zero before training, so a control image has an effect. The other parameters and
    the errors are those of `make_checkpoint`.
    """
    config = CONTROLNETS[alias].config
    return _make_network(
        "controlnet", "SanaControlNetModel", config, {"controlnet": alias}, folder, dtype, seed, shard_size, hot, on_progress
    )


def _make_network(
    component: str,
    class_name: str,
    config: Mapping[str, Any],
    marker: Mapping[str, Any],
    folder: Path,
    dtype: str,
    seed: int,
    shard_size: int,
    hot: bool,
    on_progress: OnProgress,
) -> Path:
    """Write a network of diffusers to `folder`: config.json and the weights."""
    import diffusers
    import torch

    folder = user_path(folder, "the output folder")
    _check_request(folder, dtype)
    with torch.device("meta"):
        network = getattr(diffusers, class_name)(**config)
    values = {component: RandomWeights(component, shapes_of(network), seed, hot).pieces}
    marker = {"synthetic": True, **marker, "dtype": dtype, "seed": seed} | ({"hot": True} if hot else {})
    stored = {"": _stored(network, component, dtype, values)}
    return _write(folder, marker, stored, network.save_config, "config.json", shard_size, None, on_progress)


def write_pipeline(
    pipeline: Any,
    folder: Path,
    marker: dict[str, Any],
    *,
    dtype: str = "float32",
    variant: str | None = None,
    shard_size: int = SHARD_SIZE,
    values: Mapping[str, Values] | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Path:
    """Write `pipeline` with its weights in `dtype` as the checkpoint `folder`, whole or not at all, and return `folder`.

    `values` gives the values of each network's parameters (None: those of the pipeline). `marker` is the content of `MARKER`. An
    existing synthetic checkpoint is replaced. Raises UsageError if `folder` contains anything else, and DependencyError if there is
    too little disk space (before anything is written), the disk is full or a permission is missing.
    """
    folder = user_path(folder, "the output folder")
    _check_request(folder, dtype)
    stored = {component: _stored(getattr(pipeline, component), component, dtype, values) for component in STEMS}
    configs = functools.partial(_write_configs, pipeline, dtype=dtype)
    return _write(folder, marker, stored, configs, INDEX, shard_size, variant, on_progress)


def _write(
    folder: Path,
    marker: Mapping[str, Any],
    stored: Mapping[str, StoredWeights],
    write_configs: Callable[[Path], None],
    last: str,
    shard_size: int,
    variant: str | None,
    on_progress: OnProgress,
) -> Path:
    """Write what `write_configs` writes, and the weights `stored` by the name of their folder, "" for `folder` itself.

    The file `last` says that the folder is complete.
    """
    place = OutputFolder.of(folder, f".{os.getpid()}-{threading.get_ident()}")
    folder, partial = place.folder, place.partial
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        require_free(folder.parent, sum(weights.size for weights in stored.values()) + _SMALL_FILES, f"the checkpoint {folder}")
        partial.mkdir()
        write_configs(partial)
        for number, (name, weights) in enumerate(stored.items()):
            count = _counter(on_progress, name or "weights", weights.size, number, len(stored))
            weights.write(partial / name, shard_size, variant, count)
        (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        place.put(last=last)
        on_progress(Progress("done", len(stored), len(stored)))
    except OSError as error:
        raise DependencyError(
            "the checkpoint could not be written",
            found=error,
            wanted=f"a writable disk with enough space at {folder.parent}",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def shapes_of(network: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a network's stored tensors, in its order."""
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _check_request(folder: Path, dtype: str) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise UsageError("unsupported dtype", found=dtype, wanted=", ".join(WEIGHT_DTYPES))
    OutputFolder.of(folder).check_replaceable(MARKER, "a synthetic checkpoint", "-o")


def _stored(network: Any, component: str, dtype: str, values: Mapping[str, Values] | None) -> StoredWeights:
    import torch

    stem = STEMS.get(component, "diffusion_pytorch_model")
    if values is not None:
        return StoredWeights(stem, shapes_of(network), values[component], getattr(torch, dtype))
    held = network.state_dict()
    return StoredWeights(stem, shapes_of(network), lambda name: [held[name]], getattr(torch, dtype))


def _write_configs(pipeline: Any, folder: Path, dtype: str) -> None:
    """Write everything except the weights."""
    pipeline.save_config(folder)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for component in ("transformer", "vae"):
        getattr(pipeline, component).save_config(folder / component)
    config = copy.deepcopy(pipeline.text_encoder.config)
    config.architectures, config.dtype = [type(pipeline.text_encoder).__name__], dtype
    config.save_pretrained(folder / "text_encoder")


def _counter(on_progress: OnProgress, what: str, total: int, finished: int, parts: int) -> Callable[[int], None]:
    """A function that gets the number of bytes just written and reports how much of the part `what` is written."""
    written = 0

    def count(more: int) -> None:
        nonlocal written
        written += more
        if written < total:  # the next report follows the last byte: the next part, or the end
            on_progress(Progress(f"writing {what}", finished + written / total, parts))

    return count
