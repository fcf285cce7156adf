"""A user's transformer file, autoencoder, ControlNet and LoRAs in the reference, loaded by diffusers and PEFT.

A ControlNet's tensors come from our own reader, because diffusers cannot read the original code's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sana_export.adapters import Lora, alpha_over_rank, read_config
from sana_export.checkpoint.components import variant_among
from sana_export.errors import DependencyError
from sana_export.formats.safetensors_file import TensorFile
from sana_export.lora_names import PEFT_PREFIX, Parts, find_parts
from sana_export.lora_scales import scale_of
from sana_export.verify.lora_formulas import merge_by_formula

if TYPE_CHECKING:
    from sana_export.checkpoint.checkpoint import SanaCheckpoint
    from sana_export.checkpoint.vae import Vae


def load_transformer(checkpoint: SanaCheckpoint, dtype: Any) -> Any:
    """diffusers' transformer with the checkpoint's config and the weights of its `transformer_file`, in `dtype`."""
    from diffusers import SanaTransformer2DModel

    weights = checkpoint.base_weights("transformer")
    return SanaTransformer2DModel.from_single_file(
        {name: weights[name] for name in weights},
        config=str(checkpoint.folder),
        subfolder="transformer",
        local_files_only=True,
        dtype=dtype,
    )


def load_vae(vae: Vae, dtype: Any) -> Any:
    """diffusers' autoencoder from the folder of `vae`, in `dtype`."""
    from diffusers import AutoencoderDC

    variant = variant_among([path.name for path in vae.weight_files], vae.weights_variant)
    return AutoencoderDC.from_pretrained(vae.folder, variant=variant, local_files_only=True, dtype=dtype)


def load_controlnet(checkpoint: SanaCheckpoint, dtype: Any) -> Any:
    """diffusers' network of the checkpoint's ControlNet, in `dtype`."""
    from diffusers import SanaControlNetModel

    controlnet, weights = checkpoint.controlnet, checkpoint.weights("controlnet")
    assert controlnet is not None
    network = SanaControlNetModel.from_config(controlnet.config(checkpoint.config("transformer")))
    network.load_state_dict({name: weights[name].to(dtype) for name in weights}, strict=True, assign=True)
    return network.eval()


def merge_loras(transformer: Any, loras: Sequence[Lora]) -> None:
    """Merge LoRAs, multiplied by their scales, into the weights of diffusers' transformer, in place and in their order.

    diffusers and PEFT do it where they read the kind. Formulas in float64 do the rest (lora_formulas.py). Raises DependencyError if
    PEFT is not installed, which diffusers needs for this.
    """
    if not loras:
        return
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise DependencyError(
            "comparing a bundle with a LoRA needs a package that is not installed",
            found="no module peft",
            wanted="peft",
            fix="pip install peft",
        ) from error
    layers = [name.removesuffix(".weight") for name, value in transformer.state_dict().items() if value.ndim in (2, 4)]
    read = [(lora, file, find_parts(lora.path, file, layers)) for lora in loras for file in [TensorFile(lora.weights)]]
    # The norms of a DoRA are those of the weights without any LoRA, which are gone once one is merged.
    if len(loras) > 1 and any("magnitude" in part.names or "dora_scale" in part.names for *_, parts in read for part in parts):
        merge_by_formula(transformer, read)
        return
    for lora, file, parts in read:
        _merge(transformer, lora, file, parts)


def _merge(transformer: Any, lora: Lora, file: TensorFile, parts: Sequence[Parts]) -> None:
    names = [(part, name) for part in parts for role, name in part.names.items() if role != "alpha"]
    plain = all(part.kind == "LoRA" and "dora_scale" not in part.names and part.layers == (part.module,) for part in parts)
    foreign = any(part.kind == "diff" or "dora_scale" in part.names or "alpha" in part.names for part in parts)
    if (
        lora.peft
        and not foreign
        and all(name.startswith(f"{PEFT_PREFIX}{part.layers[0]}.") and ".default" not in name for part, name in names)
    ):
        _merge_peft(transformer, lora)
    elif plain and all(name.startswith(f"transformer.{part.module}.") and "alpha" not in part.names for part, name in names):
        _merge_diffusers(transformer, lora)
    elif plain and not any("magnitude" in part.names for part in parts):
        _merge_renamed(transformer, lora, file, parts)
    else:
        merge_by_formula(transformer, [(lora, file, parts)])


def _merge_peft(transformer: Any, lora: Lora) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(transformer, str(lora.weights.parent))
    _scale_layers(model, lora)
    model.merge_and_unload()


def _merge_diffusers(transformer: Any, lora: Lora) -> None:
    from diffusers import SanaPipeline

    state, metadata = SanaPipeline.lora_state_dict(
        str(lora.weights.parent), weight_name=lora.weights.name, local_files_only=True, return_lora_metadata=True
    )
    transformer.load_lora_adapter(state, prefix="transformer", adapter_name="overlay", metadata=metadata)
    _fuse(transformer, lora)


def _merge_renamed(transformer: Any, lora: Lora, file: TensorFile, parts: Iterable[Parts]) -> None:
    """For a LoRA of a program whose names or alphas neither library reads: by the names of diffusers."""
    import torch

    config = read_config(lora, file, parts)
    matrices, alphas = {}, {}
    for part in parts:
        for role, name in (("lora_A", part.names["down"]), ("lora_B", part.names["up"])):
            matrices[f"transformer.{part.module}.{role}.weight"] = torch.from_numpy(file[name].read().copy())
        rank = file[part.names["down"]].shape[0]
        alphas[f"transformer.{part.module}.alpha"] = rank * alpha_over_rank(lora, file, part, config)
    transformer.load_lora_adapter(matrices, prefix="transformer", adapter_name="overlay", network_alphas=alphas)
    _fuse(transformer, lora)


def _fuse(transformer: Any, lora: Lora) -> None:
    _scale_layers(transformer, lora)
    transformer.fuse_lora(lora_scale=1.0, adapter_names=["overlay"])
    transformer.unload_lora()


def _scale_layers(model: Any, lora: Lora) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lycoris_utils import LycorisLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer | LycorisLayer):
            module.scale_layer(scale_of(name.removeprefix(PEFT_PREFIX), lora.scale, lora.layer_scales))
