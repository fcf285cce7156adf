"""A user's transformer file, autoencoder and LoRAs in the reference, loaded by diffusers and PEFT, not by our own readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sana_export.errors import DependencyError

if TYPE_CHECKING:
    from sana_export.adapters import Lora
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

    preferred = vae.weights_variant
    used = preferred if any(f".{preferred}" in path.name for path in vae.weight_files) else None
    return AutoencoderDC.from_pretrained(vae.folder, variant=used, local_files_only=True, dtype=dtype)


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
    (_merge_peft if lora.peft else _merge_diffusers)(transformer, lora)


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
    alphas = {name: float(value) for name, value in state.items() if name.endswith(".alpha")}
    matrices = {name: value for name, value in state.items() if name not in alphas}
    known = {"network_alphas": alphas} if alphas else {"metadata": metadata}
    transformer.load_lora_adapter(matrices, prefix="transformer", adapter_name="overlay", **known)
    transformer.fuse_lora(lora_scale=lora.scale, adapter_names=["overlay"])
    transformer.unload_lora()
