"""The reference that bundles are compared with: diffusers' pipeline, in any dtype and with the clamp that it was trained with.

In the checkpoints trained in fp16, the output of self-attention reaches ten times the largest fp16 number, and training clipped it
to +-65504. diffusers clips only when it runs in fp16 (`SanaLinearAttnProcessor2_0` and the two PAG processors in
models/attention_processor.py), so in float32 or bfloat16 the same weights give broken images
(https://github.com/huggingface/diffusers/issues/10336). The processors of this module clip in every dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sana_export.checkpoint.components import variant_among
from sana_export.errors import UsageError
from sana_export.graphs.numerics import FP16_MAX
from sana_export.verify.overlays import load_controlnet, load_transformer, load_vae, merge_loras

if TYPE_CHECKING:
    from sana_export.checkpoint.checkpoint import SanaCheckpoint
    from sana_export.manifest import Options
    from sana_export.runtime.request import Request

_SANA = {False: "SanaPipeline", True: "SanaPAGPipeline"}
_SPRINT = {False: "SanaSprintPipeline"}
#: The class in model_index.json -> whether to sample with PAG -> the class of diffusers that does that.
REFERENCES = {
    "SanaPipeline": _SANA,
    "SanaPAGPipeline": _SANA,
    "SanaControlNetPipeline": _SANA,
    "SanaSprintPipeline": _SPRINT,
    "SanaSprintImg2ImgPipeline": _SPRINT,
}
#: Parameters that diffusers' pipelines and `Request` share.
_SHARED = (
    *("prompt", "num_inference_steps", "guidance_scale", "height", "width"),
    "num_images_per_prompt",
)


class ClampedLinearAttnProcessor:
    """Calls `processor` (any of diffusers' self-attention processors for Sana) and clips its result to +-`FP16_MAX`.

    In float16 this changes nothing, because the processor clips too.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
    ) -> Any:
        """hidden_states [B, N, C] -> [B, N, C] in the same dtype."""
        output = self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)
        return output.clip(-FP16_MAX, FP16_MAX)


def _clamped(processor: Any) -> ClampedLinearAttnProcessor:
    return processor if isinstance(processor, ClampedLinearAttnProcessor) else ClampedLinearAttnProcessor(processor)


def clamp_attention(transformer: Any) -> None:
    """Clip the output of every self-attention (`attn1`) of a `SanaTransformer2DModel`, in place. Calling it again has no effect."""
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(_clamped(block.attn1.processor))


def clamp_pag_processors(pipeline: Any) -> None:
    """Clip the output of the PAG layers of a `SanaPAGPipeline`, which have other processors during a call, in place.

    The other layers keep the transformer's processors. `clamp_attention(pipeline.transformer)` is for them.
    """
    from diffusers.models.attention_processor import PAGCFGSanaLinearAttnProcessor2_0, PAGIdentitySanaLinearAttnProcessor2_0

    with_cfg, without_cfg = PAGCFGSanaLinearAttnProcessor2_0(), PAGIdentitySanaLinearAttnProcessor2_0()
    pipeline.set_pag_applied_layers(pipeline.pag_applied_layers, (_clamped(with_cfg), _clamped(without_cfg)))


def load_reference(checkpoint: SanaCheckpoint, options: Options, *, pag: bool, dtypes: Any = None) -> Any:
    """diffusers' pipeline of the checkpoint, with the clamp and, if `pag`, the PAG layers of `options`.

    It samples without a ControlNet. The checkpoint's, if it has one, is the attribute `controlnet`.

    `dtypes` is the `dtype` argument of `from_pretrained`, by default float32. Gemma-2's attention is "eager", the only
    implementation that applies its soft capping. Raises UsageError if diffusers cannot sample the checkpoint with PAG.
    """
    import diffusers
    import torch

    name = str(diffusers.DiffusionPipeline.load_config(checkpoint.folder, local_files_only=True)["_class_name"])
    if pag not in REFERENCES[name]:
        raise UsageError(
            f"{checkpoint.source} cannot be sampled with PAG", found=name, wanted="a SanaPipeline", fix="sample without a PAG scale"
        )
    # Names are regular expressions: without the anchors, "blocks.1" would match "blocks.10" too.
    layers = {"pag_applied_layers": [rf"^transformer_blocks\.{layer}\.attn1$" for layer in options.pag_layers]} if pag else {}
    dtypes = torch.float32 if dtypes is None else dtypes

    def dtype(component: str) -> Any:
        return dtypes.get(component, dtypes["default"]) if isinstance(dtypes, dict) else dtypes

    given = {} if checkpoint.transformer_file is None else {"transformer": load_transformer(checkpoint, dtype("transformer"))}
    given |= {} if checkpoint.vae is None else {"vae": load_vae(checkpoint.vae, dtype("vae"))}
    pipeline = getattr(diffusers, REFERENCES[name][pag]).from_pretrained(
        checkpoint.folder,
        dtype=dtypes,
        variant=variant_among([path.name for path in checkpoint.folder.glob("*/*")], checkpoint.weights_variant),
        local_files_only=True,
        **layers,
        **given,
    )
    merge_loras(pipeline.transformer, checkpoint.loras)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.set_attn_implementation("eager")
    if options.clamp:
        clamp_attention(pipeline.transformer)
        if pag:
            clamp_pag_processors(pipeline)
    if checkpoint.controlnet is not None:
        pipeline.controlnet = load_controlnet(checkpoint, dtype("controlnet"))
        if options.clamp:
            clamp_attention(pipeline.controlnet)
    return pipeline


def call_reference(pipeline: Any, request: Request, seed: int, *, output_type: str = "pil") -> Any:
    """The images that diffusers makes with one seed. The request must give steps, guidance scale and size."""
    import torch
    from diffusers import SanaSprintPipeline

    from sana_export.runtime.request import bins_resolution

    arguments = {name: getattr(request, name) for name in _SHARED}
    arguments["use_resolution_binning"] = bins_resolution(request, pipeline.transformer.config.sample_size)
    # Some pipelines do not have these parameters.
    arguments |= {name: value for name in ("negative_prompt", "pag_scale") if (value := getattr(request, name))}
    if isinstance(pipeline, SanaSprintPipeline) and request.num_inference_steps != 2:
        arguments["intermediate_timesteps"] = None  # its default is valid for two steps only
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(**arguments, generator=generator, output_type=output_type).images
