"""What a plan needs once, before its steps: its prompts, their cross-attention keys and values, and its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from sana_export.formats.arrays import Array, Float32
from sana_export.runtime.backends.base import Backend, DeviceTensor
from sana_export.runtime.callbacks import IsCancelled, check_cancelled
from sana_export.runtime.control import ControlConditioning, ControlImages
from sana_export.runtime.decoding import check_finite
from sana_export.runtime.embeddings_cache import EmbeddingsCache
from sana_export.runtime.encoding import encode_image
from sana_export.runtime.image_start import ImageStart
from sana_export.runtime.memory import TEXT_STAGE
from sana_export.runtime.plan import Plan
from sana_export.runtime.prompt import GivenEmbeddings, PromptEmbeddings, PromptEncoder, PromptTokens, needed
from sana_export.runtime.results import Conditioning
from sana_export.runtime.sessions import Sessions

#: The number of the instruction's prefixes that stay on the device. Most prompts share the same number of its tokens.
KEPT_PREFIXES = 4


class PlanEncoder:
    """Encodes plans with the sessions of a runtime, whose lock the caller holds."""

    def __init__(self, text: PromptEncoder, backend: Backend, sessions: Sessions, cache: EmbeddingsCache) -> None:
        self._text, self._backend, self._sessions, self._cache = text, backend, sessions, cache
        self._prefixes: dict[int, DeviceTensor] = {}

    def clear(self) -> None:
        """Release what stays on the device between two plans, without the cache."""
        self._prefixes.clear()

    def embed(self, tokens: Sequence[Sequence[PromptTokens]], given: Mapping[int, GivenEmbeddings]) -> PromptEmbeddings:
        """The embeddings of prompts, by branch. The text encoder runs on those that are not in the cache."""
        if any(prompt not in self._cache for prompt in needed(tokens)):
            self._sessions.require(TEXT_STAGE)
        return self._text.encode(tokens, self._run_text_encoder, self._backend.text_multiple, given, self._cache)

    def encode_images(self, source: ImageStart | ControlImages, cancelled: IsCancelled | None) -> Float32:
        """float32 [B, C, h, w]: the latents of each drawn image's own image. Raises ArtifactError if they are not finite."""
        before_tile = partial(check_cancelled, cancelled)
        self._sessions.require(source.encoder_graphs)
        encoded = [encode_image(image, source.tile, self._backend, self._sessions, before_tile) for image in source.images]
        latents: Float32 = np.concatenate([encoded[number] for number in source.sources])
        check_finite(latents, "latents of the image", self._backend)
        return latents

    def encode(self, plan: Plan, cancelled: IsCancelled | None) -> Conditioning:
        """Everything of `plan` that the denoiser and a ControlNet read."""
        backend = self._backend
        start = backend.record_event()
        embeddings = self.embed(self._text.tokenize_plan(plan.texts, plan.max_sequence_length), plan.embeddings)
        embeddings = embeddings.repeated(plan.images_per_prompt).padded(backend.text_multiple, plan.max_sequence_length)
        gathered = backend.gather(embeddings)
        encoded = backend.record_event()
        # A staged runtime drops what is loaded of other stages, and loads no text encoder that nothing needs.
        contexts = ("context",) if plan.control is None else ("context", "controlnet_context")
        self._sessions.require((*(name for name in TEXT_STAGE if name in self._sessions and name not in contexts), *contexts))
        prompts = None if plan.always_guided else embeddings.only(plan.branches.texts.index("cond"))
        # Without the negative prompts, the graphs run again: the branches lie interleaved in their outputs.
        alone = None if prompts is None else backend.gather(prompts)
        made = [(self._context(name, gathered), None if alone is None else self._context(name, alone)) for name in contexts]
        mask = backend.to_device(embeddings.context_mask)
        unguided = None if prompts is None else (made[0][1], backend.to_device(prompts.context_mask))
        events = (start, encoded, backend.record_event())
        image_latents = None if plan.image is None else self.encode_images(plan.image, cancelled)
        control = None
        if plan.control is not None:
            latents = self.encode_images(plan.control, cancelled)
            control = ControlConditioning(*made[1], backend.to_device(latents), latents.shape)
        return Conditioning(made[0][0], mask, embeddings.shape[:3], events, unguided, image_latents, control)

    def _context(self, graph: str, embeds: DeviceTensor | Array) -> DeviceTensor:
        """The output of a context graph, which is named after it."""
        return self._sessions[graph].run({"prompt_embeds": embeds})[graph]

    def _run_text_encoder(self, inputs_embeds: Float32, prefix: Float32) -> DeviceTensor:
        """Run the text encoder. Each prefix of the instruction's keys and values is uploaded once; its length identifies it."""
        shared = prefix.shape[3]
        if shared not in self._prefixes:
            while len(self._prefixes) >= KEPT_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            self._prefixes[shared] = self._backend.to_device(np.ascontiguousarray(prefix))
        feeds = {"inputs_embeds": inputs_embeds, "prefix": self._prefixes[shared]}
        return self._sessions["text_encoder"].run(feeds)["prompt_embeds"]
