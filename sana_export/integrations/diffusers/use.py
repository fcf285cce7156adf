"""`use_bundle` puts a bundle behind a pipeline's components; `restore` brings the pipeline's own back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
)
from torch import nn
from transformers import Gemma2Model

from sana_export.errors import UsageError
from sana_export.integrations.diffusers.belonging import CHECKS, ComponentPair, check_plain
from sana_export.integrations.diffusers.module import REFUSED_BY_PIPELINES, BundleModule, refusing
from sana_export.integrations.diffusers.text_encoder import BundleTextEncoder
from sana_export.integrations.diffusers.transformer import BundleControlNet, BundleTransformer
from sana_export.integrations.diffusers.vae import BundleVae
from sana_export.runtime.backends.base import Loader
from sana_export.runtime.memory import AUTO
from sana_export.runtime.missing_graphs import no_controlnet, no_encoder
from sana_export.runtime.pipeline import SanaRuntime

PIPELINES = (SanaPipeline, SanaPAGPipeline, SanaSprintPipeline, SanaSprintImg2ImgPipeline, SanaControlNetPipeline)
#: The components that a bundle takes the place of: their class, and the stand-in's.
STAND_INS: Mapping[str, tuple[Any, Any]] = {
    "text_encoder": (Gemma2Model, BundleTextEncoder),
    "transformer": (SanaTransformer2DModel, BundleTransformer),
    "vae": (AutoencoderDC, BundleVae),
    "controlnet": (SanaControlNetModel, BundleControlNet),
}
#: Pipelines that encode an image, so that they need the graphs of the group "img2img".
_ENCODING = (SanaSprintImg2ImgPipeline, SanaControlNetPipeline)


class BundleUse:
    """A bundle in a pipeline. In a `with` block, the pipeline gets its own components back at the end."""

    def __init__(self, pipe: Any, runtime: SanaRuntime, *, owned: bool) -> None:
        #: The pipeline.
        self.pipe = pipe
        #: What runs the bundle. `runtime.load_lora(path, scale)` works while the pipeline uses it.
        self.runtime = runtime
        #: Whether `use_bundle` opened the runtime, which `restore` closes then.
        self.owned = owned

    def __enter__(self) -> BundleUse:
        return self

    def __exit__(self, *_: object) -> None:
        restore(self.pipe)


def use_bundle(
    pipe: Any,
    bundle: str | Path | SanaRuntime,
    backend: str | Loader = AUTO,
    *,
    device: int | None = None,
    threads: int | None = None,
    memory: str = AUTO,
    backend_options: Mapping[str, Any] | None = None,
) -> BundleUse:
    """Run the components of `pipe` with the graphs of `bundle`: text encoder, transformer, autoencoder and ControlNet.

    pipe: one of diffusers' Sana pipelines (`PIPELINES`), with the weights of the bundle's checkpoint. Its scheduler, tokenizer and
    code stay. A component that is None stays None.
    bundle: the bundle's folder, or a `SanaRuntime` of it.
    The other parameters are those of `SanaRuntime.from_pretrained`. Use the bundle before `pipe.to("cuda")`: then the pipeline's
    own weights stay in the host's memory.

    A second call for the same pipeline replaces the first one's bundle. Raises UsageError for another pipeline, or one with hooks
    or a LoRA; ArtifactError if the weights are not those of the bundle's checkpoint, or the bundle lacks graphs or PAG layers that
    the pipeline needs; and the errors of `SanaRuntime.from_pretrained`. The pipeline is unchanged then.
    """
    if not isinstance(pipe, PIPELINES):
        names = ", ".join(kind.__name__ for kind in PIPELINES)
        raise UsageError("a bundle cannot be used in this object", found=type(pipe).__name__, wanted=f"one of {names}")
    owned = not isinstance(bundle, SanaRuntime)
    runtime = (
        bundle
        if isinstance(bundle, SanaRuntime)
        else SanaRuntime.from_pretrained(
            bundle, backend=backend, device=device, threads=threads, memory=memory, backend_options=backend_options
        )
    )
    use = BundleUse(pipe, runtime, owned=owned)
    try:
        made = _stand_ins(use)
    except BaseException:
        if owned:
            runtime.close()
        raise
    for before in {stand_in.use for stand_in in _present(pipe).values()}:
        if before.runtime is runtime:  # it stays open, and is closed with this use
            use.owned, before.owned = use.owned or before.owned, False
    restore(pipe)
    for name, module in made.items():
        _put(pipe, name, module)
    for name, instead in REFUSED_BY_PIPELINES.items():
        pipe.__dict__[name] = refusing(name, instead)
    return use


def restore(pipe: Any) -> None:
    """Give `pipe` its own components back, and release the bundle that `use_bundle` loaded. Without a bundle nothing happens."""
    found = _present(pipe)
    for name, module in found.items():
        if getattr(pipe, name) is module:
            _put(pipe, name, module.original)
        else:  # assigned by the user, which changed the pipeline's config too
            setattr(pipe, name, module.original)
    for name in REFUSED_BY_PIPELINES if found else ():
        pipe.__dict__.pop(name, None)
    for use in {module.use for module in found.values()}:
        if use.owned:
            use.runtime.close()


def _present(pipe: Any) -> dict[str, BundleModule]:
    """The stand-ins in `pipe`, also those that torch.compile has wrapped."""
    held = {name: getattr(pipe, name, None) for name in STAND_INS}
    inner = {name: getattr(module, "_orig_mod", module) for name, module in held.items()}
    return {name: module for name, module in inner.items() if isinstance(module, BundleModule)}


def _put(pipe: Any, name: str, module: nn.Module) -> None:
    """Set a component. Its entry in the pipeline's config is left as it is: a pipeline says what it was loaded from."""
    object.__setattr__(pipe, name, module)


def _stand_ins(use: BundleUse) -> dict[str, BundleModule]:
    """A stand-in for each component that `use.pipe` has, checked."""
    pipe, runtime = use.pipe, use.runtime
    _check_graphs(pipe, runtime)
    made: dict[str, BundleModule] = {}
    present = _present(pipe)
    for name, (kind, stand_in) in STAND_INS.items():
        module = present[name].original if name in present else getattr(pipe, name, None)
        if module is None:
            continue
        pair = ComponentPair(name, module, pipe, runtime)
        check_plain(pair, kind)
        CHECKS[name](pair)
        made[name] = skeleton(stand_in, module).attach(name, use, module)
    return made


def skeleton(stand_in: type[BundleModule], original: Any) -> BundleModule:
    """A stand-in of `original`'s config without weights."""
    with torch.device("meta"):
        if isinstance(original, Gemma2Model):
            return stand_in(copy.deepcopy(original.config))
        made = stand_in.from_config(original.config)  # type: ignore[attr-defined]
    made.register_to_config(**original.config)
    return made


def _check_graphs(pipe: Any, runtime: SanaRuntime) -> None:
    """Raise ArtifactError if the bundle lacks graphs that the pipeline needs."""
    graphs = runtime.manifest.graphs
    if isinstance(pipe, SanaControlNetPipeline) and "controlnet" not in graphs:
        raise no_controlnet(runtime.bundle, runtime.manifest, f"a {type(pipe).__name__}")
    if isinstance(pipe, _ENCODING) and "vae_encoder" not in graphs:
        raise no_encoder(runtime.bundle, runtime.manifest, f"a {type(pipe).__name__}, which encodes an image")
