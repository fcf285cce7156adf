"""Words of diffusers' Sana pipelines that the runtime does not take, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from sana_export.errors import UsageError
from sana_export.numeric import shown


@dataclass(frozen=True)
class Word:
    """A parameter that is not taken."""

    #: What to write instead, or a function that says so for a value.
    instead: str | Callable[[Any], str]
    #: Whether a value means what the runtime does without the parameter. None always does.
    neutral: Callable[[Any], bool] = lambda value: False


def _seed(generator: Any) -> str:
    """The seed that draws what fresh torch generators draw."""
    many = isinstance(generator, list | tuple)
    each = list(generator) if many else [generator]
    try:
        on_gpu = any(one.device.type != "cpu" for one in each)
        seeds = [int(one.initial_seed()) for one in each]
    except Exception:  # any: it is something else than a generator of torch
        return "seed=42, or a seed for each image"
    if on_gpu:
        return "seed=..., the numbers of a generator on the CPU; or latents=..., drawn with this generator"
    return f"seed={seeds if many else seeds[0]}, if this generator has drawn nothing yet; or latents=..., drawn with it"


#: The parameters of a call.
CALL_WORDS: Mapping[str, Word] = {
    "generator": Word(_seed),
    # No scheduler of a Sana checkpoint has an eta: diffusers ignores it too.
    "eta": Word("no eta", lambda value: True),
    "clean_caption": Word("a prompt that is clean already", lambda value: value is False),
    "attention_kwargs": Word("runtime.load_lora(path, scale) for the scale of a LoRA", lambda value: value == {}),
    "cross_attention_kwargs": Word("runtime.load_lora(path, scale) for the scale of a LoRA", lambda value: value == {}),
    "callback": Word("callback_on_step_end"),
    "callback_steps": Word("callback_on_step_end, which is called after every step"),
    "mask_image": Word("mask"),
    "padding_mask_crop": Word("an image and a mask that are cropped already"),
    "frames": Word("a prompt: there is no video"),
    "num_videos_per_prompt": Word("num_images_per_prompt: there is no video"),
    "pag_applied_layers": Word("the layers at the export: sana-export export --pag-layers"),
    "lora_scale": Word("runtime.load_lora(path, scale)"),
    "steps": Word("num_inference_steps"),
    "num_steps": Word("num_inference_steps"),
    "images_per_prompt": Word("num_images_per_prompt"),
    "num_images": Word("num_images_per_prompt"),
    "batch_size": Word("num_images_per_prompt, or a list of prompts"),
    "cfg_scale": Word("guidance_scale"),
    "resolution_binning": Word("use_resolution_binning"),
    "size": Word("height and width"),
    "callback_on_step_end_tensor_inputs": Word('["latents"]', lambda value: list(value) == ["latents"]),
}
#: The parameters of `from_pretrained`. A bundle has its precision, files and weights.
LOADING_WORDS: Mapping[str, Word] = {
    "torch_dtype": Word("the precision at the export: sana-export export --dtype"),
    "dtype": Word("the precision at the export: sana-export export --dtype"),
    "variant": Word("the weight files at the export: sana-export export --variant"),
    "pag_applied_layers": Word("the layers at the export: sana-export export --pag-layers"),
    "device_map": Word("device, the index of a GPU"),
    "use_safetensors": Word("the folder of a bundle"),
    "low_cpu_mem_usage": Word('memory="staged"'),
    "provider": Word('backend, and backend_options={"provider_options": {...}}'),
    "providers": Word('backend, and backend_options={"provider_options": {...}}'),
}
#: The parameters of `encode_prompt`.
ENCODING_WORDS: Mapping[str, Word] = {
    "num_images_per_prompt": Word("num_images_per_prompt in the call that takes the embeddings", lambda value: value == 1),
    # Results are on the host, wherever the text encoder runs.
    "device": Word("no device", lambda value: True),
    "clean_caption": CALL_WORDS["clean_caption"],
    "lora_scale": CALL_WORDS["lora_scale"],
    **{
        f"{name}{part}": Word(f"runtime({name}{part}=...): they are encoded already")
        for name in ("prompt", "negative_prompt")
        for part in ("_embeds", "_attention_mask")
    },
}
#: Methods and attributes of diffusers' pipelines.
METHODS: Mapping[str, str] = {
    "to": "SanaRuntime.from_pretrained(bundle, device=0)",
    "enable_model_cpu_offload": 'SanaRuntime.from_pretrained(bundle, memory="staged")',
    "enable_sequential_cpu_offload": 'SanaRuntime.from_pretrained(bundle, memory="streaming")',
    "enable_vae_tiling": "runtime(prompt, decoder_tile=512)",
    "load_lora_weights": "runtime.load_lora(path, scale)",
    "set_adapters": "runtime.load_lora(path, scale), for each LoRA with its scale",
    "fuse_lora": "runtime.load_lora(path, scale)",
    "unfuse_lora": "runtime.unload_lora()",
    "unload_lora_weights": "runtime.unload_lora()",
    "set_progress_bar_config": "callback_on_step_end, which is called after every step",
    "scheduler": 'runtime(prompt, scheduler="unipc"), for each call; runtime.manifest.model.scheduler is the checkpoint\'s',
}


def check_words(call: str, given: Mapping[str, Any], words: Mapping[str, Word], known: Collection[str]) -> None:
    """Raise UsageError for a parameter in `given`, unless its value is neutral. `call` takes the parameters `known`."""
    for name, value in given.items():
        word = words.get(name)
        if word is None:
            near = difflib.get_close_matches(name, [*known, *words], n=1)
            raise UsageError(f"{call} has no parameter {name!r}", wanted=f"{near[0]}?" if near else ", ".join(known))
        if value is None or _is_neutral(word, value):
            continue
        instead = word.instead if isinstance(word.instead, str) else word.instead(value)
        raise UsageError(f"{call} does not take {name}", found=shown(value), wanted=instead)


def parameters_of(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names that a call of `method` may use."""
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return tuple(name for name, item in signature(method).parameters.items() if item.kind in kinds and name != "self")


def _is_neutral(word: Word, value: Any) -> bool:
    try:
        return bool(word.neutral(value))
    except Exception:  # any: the value is the caller's
        return False
