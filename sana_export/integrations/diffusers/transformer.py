"""The stand-ins for the transformer and the ControlNet: one step of the denoiser for a batch as diffusers builds it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from diffusers.models.attention_processor import (
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)
from diffusers.models.controlnets.controlnet_sana import SanaControlNetOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn

from sana_export.commands import export_command
from sana_export.contract import GraphSpec
from sana_export.errors import ArtifactError, UsageError
from sana_export.graphs.numerics import NUMERICS
from sana_export.integrations.diffusers.contexts import PromptContexts, same_in_all
from sana_export.integrations.diffusers.module import BundleModule, graph_call, refusal
from sana_export.runtime.backends.base import DeviceTensor
from sana_export.runtime.missing_graphs import no_controlnet
from sana_export.runtime.pipeline import SanaRuntime
from sana_export.verify.reference import ClampedLinearAttnProcessor

#: The branches that a self-attention processor stands for: 1 for the perturbed one, which is the last of the batch.
PERTURBED: dict[type, tuple[float, ...]] = {
    PAGCFGSanaLinearAttnProcessor2_0: (0.0, 0.0, 1.0),
    PAGIdentitySanaLinearAttnProcessor2_0: (0.0, 1.0),
}


class _Step(BundleModule):
    """What one step of both has in common."""

    #: The graph that makes the context.
    context_graph = "context"

    def attach(self, name: str, use: Any, original: nn.Module) -> _Step:
        super().attach(name, use, original)
        self.attentions = attentions(self)
        for (own, cross), (theirs, their_cross) in zip(self.attentions, attentions(original), strict=True):
            own.processor, cross.processor = theirs.processor, their_cross.processor  # PAG's may be set already
        self.contexts = PromptContexts(self.runtime, self.exchange, self.context_graph)
        return self

    def number(self, name: str, value: Tensor | float) -> DeviceTensor:
        """A number that is the same for the whole batch, float32 [1]. Raises UsageError if it is not."""
        values = torch.as_tensor(value, dtype=torch.float32, device=self.device).reshape(-1)
        if len(values) > 1 and not bool((values == values[0]).all()):
            raise UsageError(f"{name} differs within a batch", found=values.tolist(), wanted="one number for all images")
        return self.exchange.give(values[:1])

    def spec(self, graph: str) -> GraphSpec:
        """The graph's inputs and outputs."""
        return self.runtime.manifest.graphs[graph].spec

    def processors(self) -> Iterator[tuple[int, type]]:
        """The class of each self-attention's processor. Raises UsageError for one that the bundle cannot follow."""
        if (strange := unknown_processor(self.attentions)) is not None:
            raise refusal(strange, "the processors of diffusers' Sana pipelines")
        for index, (own, _) in enumerate(self.attentions):
            yield index, plain(own.processor)


class BundleTransformer(_Step, SanaTransformer2DModel):
    """The transformer's own parameters -> its prediction, float32 [N, C, h, w].

    The batch is split into the guidance branches that it was made of, so that they share the work which is the same for all.
    """

    def set_attn_processor(self, processor: Any) -> None:
        """As in diffusers, for the processors of PAG. Raises UsageError for others, and leaves the old ones."""
        before, parent = self.attn_processors, cast(Any, super())
        parent.set_attn_processor(processor)
        try:
            self.perturbed()
        except (ArtifactError, UsageError):
            parent.set_attn_processor(before)
            raise

    def perturbed(self) -> tuple[float, ...] | None:
        """The branches that PAG's processors stand for; None without PAG. Raises ArtifactError for layers that the bundle lacks."""
        found = dict(self.processors())
        layers = tuple(index for index, kind in found.items() if kind in PERTURBED)
        if not layers:
            return None
        check_pag_layers(layers, self.runtime)
        kinds = {found[index] for index in layers}
        if len(kinds) > 1:
            raise refusal("a mixture of PAG's processors", "one of them in all layers")
        return PERTURBED[kinds.pop()]

    def remove_pag(self) -> None:
        """Give all blocks plain processors: SanaPAGPipeline leaves its own behind if a call fails, and adds to them in the next."""
        for own, _ in self.attentions:
            if plain(own.processor) in PERTURBED:
                own.processor = SanaLinearAttnProcessor2_0()

    @graph_call
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
    ) -> Any:
        self.check_neutral(attention_mask=attention_mask)
        check_attention_kwargs(attention_kwargs)
        try:
            perturbed = self.perturbed()
        except (ArtifactError, UsageError):
            self.remove_pag()
            raise
        if perturbed is None:
            guided = self.config.guidance_embeds is False and same_in_all(hidden_states, 2) and len(hidden_states) % 2 == 0
            perturbed = (0.0, 0.0) if guided else (0.0,)
        elif not same_in_all(hidden_states, len(perturbed)):
            raise UsageError(
                "the latents of a PAG batch differ between its branches",
                found=f"{len(hidden_states)} latents",
                wanted=f"{len(perturbed)} times the same latents, as SanaPAGPipeline passes them",
            )
        batch = len(hidden_states) // len(perturbed)
        latents = hidden_states[:batch]
        prompts = self.contexts.of(encoder_hidden_states, encoder_attention_mask, perturbed)
        feeds: dict[str, Any] = {
            "latents": self.exchange.give(latents),
            "timestep": self.number("timestep", timestep),
            "context": prompts.context,
            "context_mask": prompts.mask,
            "perturbed": self.exchange.give(torch.tensor(perturbed)),
            "source": prompts.source,
        }
        names = [tensor.name for tensor in self.spec("denoiser").inputs]
        if "guidance" in names:
            if guidance is None:
                raise UsageError(
                    "a SANA-Sprint transformer needs guidance", found="guidance=None", wanted="the guidance scale of the pipeline"
                )
            # The graph multiplies the guidance scale by this factor, as the pipeline has done already.
            feeds["guidance"] = self.number("guidance", guidance / self.config.guidance_embeds_scale)
        feeds |= self._residuals(controlnet_block_samples, prompts.text_branches, latents)
        noise_pred = self.exchange.take(self.runtime.run("denoiser", {name: feeds[name] for name in names})["noise_pred"])
        sample = noise_pred.flatten(0, 1).to(hidden_states.device)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _residuals(self, samples: Sequence[Tensor] | None, branches: int, latents: Tensor) -> dict[str, DeviceTensor]:
        """The denoiser's input `residuals`, if it has one: what a ControlNet adds after the first blocks, or zeros."""
        spec = next((tensor for tensor in self.spec("denoiser").inputs if tensor.name == "residuals"), None)
        if spec is None:
            if samples is not None:
                raise no_controlnet(self.runtime.bundle, self.runtime.manifest, "controlnet_block_samples")
            return {}
        batch, _, height, width = latents.shape
        layers, channels = spec.shape[0], spec.shape[-1]
        shape = (int(layers), branches, batch, height, width, int(channels))
        if samples is None:
            kept = self.__dict__.get("no_residuals")
            if kept is None or kept[0] != shape:
                kept = self.no_residuals = (shape, self.runtime.backend.zeros(shape, spec.dtype))
            return {"residuals": kept[1]}
        if len(samples) != layers or samples[0].numel() * int(layers) != torch.Size(shape).numel():
            raise UsageError(
                "controlnet_block_samples do not fit the bundle",
                found=f"{len(samples)} of shape {list(samples[0].shape)}",
                wanted=f"{layers} of shape {[branches * batch, height * width, channels]}",
            )
        scale = NUMERICS[spec.dtype].scale
        stacked = torch.stack([sample.float() * scale for sample in samples]).reshape(shape)
        return {"residuals": self.exchange.give(stacked, spec.dtype)}


class BundleControlNet(_Step, SanaControlNetModel):
    """The ControlNet's own parameters -> its residuals, a list of float32 [N, h * w, C']."""

    context_graph = "controlnet_context"

    @graph_call
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        self.check_neutral(attention_mask=attention_mask)
        check_attention_kwargs(attention_kwargs)
        for _, kind in self.processors():
            if kind in PERTURBED:
                raise refusal("PAG in a ControlNet", "PAG in the transformer")
        guided = len(hidden_states) % 2 == 0 and same_in_all(hidden_states, 2) and same_in_all(controlnet_cond, 2)
        branches = 2 if guided else 1
        batch = len(hidden_states) // branches
        prompts = self.contexts.of(encoder_hidden_states, encoder_attention_mask, (0.0,) * branches)
        feeds = {
            "latents": self.exchange.give(hidden_states[:batch]),
            "timestep": self.number("timestep", timestep),
            "control": self.exchange.give(controlnet_cond[:batch]),
            "conditioning_scale": self.number("conditioning_scale", conditioning_scale),
            "context": prompts.context,
            "context_mask": prompts.mask,
        }
        residuals = self.exchange.take(self.runtime.run("controlnet", feeds)["residuals"])
        scale = NUMERICS[self.spec("controlnet").outputs[0].dtype].scale
        samples: Any = list((residuals.float() / scale).flatten(3, 4).flatten(1, 2).to(hidden_states.device))
        return SanaControlNetOutput(controlnet_block_samples=samples) if return_dict else (samples,)


def plain(processor: Any) -> type:
    """The class of a processor, without the clamp that the reference puts around it."""
    return type(processor.processor if isinstance(processor, ClampedLinearAttnProcessor) else processor)


def attentions(module: Any) -> list[tuple[Any, Any]]:
    """The self- and the cross-attention of each block of a transformer or ControlNet."""
    return [(block.attn1, block.attn2) for block in module.transformer_blocks]


def unknown_processor(blocks: Sequence[tuple[Any, Any]]) -> str | None:
    """The first attention processor that a bundle cannot follow, in words; None if there is none."""
    for index, (own, cross) in enumerate(blocks):
        kind, other = plain(own.processor), type(cross.processor)
        if (kind is not SanaLinearAttnProcessor2_0 and kind not in PERTURBED) or other is not SanaAttnProcessor2_0:
            strange = other if other is not SanaAttnProcessor2_0 else kind
            return f"the attention processor {strange.__name__} in block {index}"
    return None


def pag_layers(names: Sequence[str], blocks: int) -> tuple[int, ...]:
    """The blocks whose self-attention the names of `set_pag_applied_layers` match, as diffusers matches them."""
    return tuple(index for index in range(blocks) if any(re.search(name, f"transformer_blocks.{index}.attn1") for name in names))


def check_pag_layers(layers: tuple[int, ...], runtime: SanaRuntime) -> None:
    """Raise ArtifactError unless `layers` are those that the bundle can perturb."""
    own = runtime.manifest.options.pag_layers
    if tuple(own) != layers:
        raise ArtifactError(
            f"{runtime.bundle} has other PAG layers than the pipeline",
            found=f"transformer_blocks {', '.join(map(str, own)) or '(none)'} in the bundle",
            wanted=f"transformer_blocks {', '.join(map(str, layers))}",
            fix=export_command(runtime.bundle, runtime.manifest, pag_layers=layers)
            + (f", or pipe.set_pag_applied_layers({[f'transformer_blocks.{layer}.attn1$' for layer in own]})" if own else ""),
        )


def check_attention_kwargs(given: dict[str, Any] | None) -> None:
    """Raise UsageError for anything but a scale of 1, which has no effect."""
    if given and given != {"scale": 1.0}:
        raise refusal("attention_kwargs", "use.runtime.load_lora(path, scale) for the scale of a LoRA")
