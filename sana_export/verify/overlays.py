"""A user's transformer file, autoencoder, ControlNet and LoRAs in the reference, loaded by diffusers and PEFT.

A ControlNet's tensors come from our own reader, because diffusers cannot read the original code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sana_export.adapters import Lora, read_config
from sana_export.checkpoint.components import variant_among
from sana_export.errors import DependencyError
from sana_export.formats.safetensors_file import TensorFile
from sana_export.lora_names import PEFT_PREFIX, Parts, find_parts

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


def merge_lora(transformer: Any, lora: Lora) -> None:
    """Merge a LoRA, multiplied by its scale, into the weights of diffusers' transformer, in place.

    Raises DependencyError if PEFT is not installed, which diffusers needs for this.
    """
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
    file = TensorFile(lora.weights)
    parts = find_parts(lora.path, file, layers)
    if lora.peft and all(names.down == f"{PEFT_PREFIX}{layer}.lora_A.weight" for layer, names in parts.items()):
        _merge_peft(transformer, lora)
    elif all(names.down.startswith(f"transformer.{layer}.") and names.alpha is None for layer, names in parts.items()):
        _merge_diffusers(transformer, lora)
    else:
        _merge_renamed(transformer, lora, file, parts)


def _merge_peft(transformer: Any, lora: Lora) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(transformer, str(lora.weights.parent))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(lora.scale)
    model.merge_and_unload()


def _merge_diffusers(transformer: Any, lora: Lora) -> None:
    from diffusers import SanaPipeline

    state, metadata = SanaPipeline.lora_state_dict(
        str(lora.weights.parent), weight_name=lora.weights.name, local_files_only=True, return_lora_metadata=True
    )
    transformer.load_lora_adapter(state, prefix="transformer", adapter_name="overlay", metadata=metadata)
    _fuse(transformer, lora)


def _merge_renamed(transformer: Any, lora: Lora, file: TensorFile, parts: Mapping[str, Parts]) -> None:
    """For a LoRA of a program whose names or alphas neither library reads: by the names of diffusers."""
    import torch

    config = read_config(lora, file, parts)
    matrices, alphas = {}, {}
    for layer, names in parts.items():
        for role, name in (("lora_A", names.down), ("lora_B", names.up)):
            matrices[f"transformer.{layer}.{role}.weight"] = torch.from_numpy(file[name].read().copy())
        rank = file[names.down].shape[0]
        alpha = config.alpha_of(layer) if config is not None else float(rank)
        if names.alpha is not None:
            alpha = file[names.alpha].read().item()
        alphas[f"transformer.{layer}.alpha"] = alpha * (rank**0.5 if config is not None and config.rslora else 1)
    transformer.load_lora_adapter(matrices, prefix="transformer", adapter_name="overlay", network_alphas=alphas)
    _fuse(transformer, lora)


def _fuse(transformer: Any, lora: Lora) -> None:
    transformer.fuse_lora(lora_scale=lora.scale, adapter_names=["overlay"])
    transformer.unload_lora()
