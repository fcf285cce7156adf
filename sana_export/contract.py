"""The tensors of every deployment graph: the one table that export, engine build and runtime all read.

A dimension is a name. Names in `DYNAMIC_AXES` stay symbolic in the ONNX graph; every other name is a property of the
checkpoint and is replaced by its number (`resolve`). `PRECISION` stands for the dtype that the bundle was exported in.
Everything that crosses to the host is float32 or an integer; what stays on the device between two graphs is in PRECISION.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

#: The longest instruction and prompt together; attention windows at least this wide never bind.
MAX_TOKENS = 2048

#: The graphs that decode images in one piece (False) and in tiles (True).
DECODERS: dict[bool, set[str]] = {False: {"vae_decoder"}, True: {"vae_decoder_head", "vae_decoder_tail"}}

PRECISION = "precision"

#: Axes that a request chooses. Latent sizes are in latent pixels (1/32 of the image's), the others in what they name; a tile's are
#: in features, those of a tile_image in pixels.
DYNAMIC_AXES = (
    "batch",
    "branches",
    "tokens",
    "prefix_tokens",
    "text_tokens",
    "latent_height",
    "latent_width",
    "feature_height",
    "feature_width",
    "tile_height",
    "tile_width",
    "tile_image_height",
    "tile_image_width",
    "image_height",
    "image_width",
    "output_height",
    "output_width",
)

Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor; `shape` mixes axis names and numbers."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class GraphSpec:
    """One deployment graph: its inputs and outputs, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


LATENTS: Shape = ("batch", "latent_channels", "latent_height", "latent_width")
FEATURES: Shape = ("batch", "feature_channels", "feature_height", "feature_width")
CONTEXT: Shape = (
    "layers",
    2,
    "branches",
    "batch",
    "cross_attention_heads",
    "text_tokens",
    "cross_attention_head_dim",
)


def _f32(name: str, *shape: str | int) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


GRAPHS: dict[str, GraphSpec] = {
    graph.name: graph
    for graph in (
        GraphSpec(
            "text_encoder",
            (
                _f32("inputs_embeds", "batch", "tokens", "text_channels"),
                _f32("prefix", "text_layers", 2, "text_kv_heads", "prefix_tokens", "text_head_dim"),
            ),
            (_f32("prompt_embeds", "batch", "tokens", "text_channels"),),
        ),
        GraphSpec(
            "context",
            (_f32("prompt_embeds", "branches", "batch", "text_tokens", "text_channels"),),
            (TensorSpec("context", PRECISION, CONTEXT),),
        ),
        GraphSpec(
            "denoiser",
            (
                _f32("latents", *LATENTS),
                _f32("timestep", 1),
                TensorSpec("context", PRECISION, CONTEXT),
                _f32("context_mask", "branches", "batch", "text_tokens"),
                _f32("perturbed", "branches"),
                _f32("guidance", 1),
            ),
            (_f32("noise_pred", "branches", *LATENTS),),
        ),
        GraphSpec(
            "sampler",
            (
                _f32("noise_pred", "branches", *LATENTS),
                _f32("latents", *LATENTS),
                _f32("previous_x0", *LATENTS),
                _f32("noise", *LATENTS),
                _f32("coefficients", "coefficients"),
                _f32("weights", "branches"),
            ),
            (_f32("next_latents", *LATENTS), _f32("x0", *LATENTS)),
        ),
        GraphSpec(
            "vae_decoder",
            (_f32("latents", *LATENTS),),
            (_f32("image", "batch", 3, "image_height", "image_width"),),
        ),
        GraphSpec(
            "vae_decoder_head",
            (_f32("latents", *LATENTS),),
            (TensorSpec("features", PRECISION, FEATURES),),
        ),
        GraphSpec(
            "vae_decoder_tail",
            (
                TensorSpec("features", PRECISION, FEATURES),
                TensorSpec("row_index", "int64", ("tile_height",)),
                TensorSpec("column_index", "int64", ("tile_width",)),
            ),
            (_f32("image", "batch", 3, "tile_image_height", "tile_image_width"),),
        ),
        GraphSpec(
            "postprocess",
            (
                _f32("image", "batch", 3, "image_height", "image_width"),
                TensorSpec("row_index", "int64", (2, "output_height")),
                _f32("row_weight", 2, "output_height"),
                TensorSpec("column_index", "int64", (2, "output_width")),
                _f32("column_weight", 2, "output_width"),
            ),
            (TensorSpec("pixels", "uint8", ("batch", "output_height", "output_width", 3)),),
        ),
    )
}

#: Graphs whose weights are a part of another's: they lie in its folder and read its weight file.
WEIGHTS_OF = {"vae_decoder_head": "vae_decoder", "vae_decoder_tail": "vae_decoder"}

#: Tensors that a graph has only where the checkpoint has the feature: a switch of its transformer's config.
FEATURE_TENSORS = {"guidance": "guidance_embeds"}

#: The columns of a schedule's row, in the order of the sampler's `coefficients` input:
#: x0 = x0_latents * latents + x0_noise_pred * noise_pred
#: next_latents = latents * latents + x0 * x0 + previous_x0 * previous_x0 + noise * noise
COEFFICIENTS = ("x0_latents", "x0_noise_pred", "latents", "x0", "previous_x0", "noise")


def resolve(name: str, dimensions: Mapping[str, int], precision: str, features: Collection[str] = ()) -> GraphSpec:
    """The graph `name` with the checkpoint's `dimensions` and `precision` ("float32", "float16", "bfloat16") filled in.

    Tensors of features (`FEATURE_TENSORS`) that are not among `features` are left out.
    """
    sizes = {"coefficients": len(COEFFICIENTS), **dimensions}

    def fill(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                tensor.name,
                precision if tensor.dtype == PRECISION else tensor.dtype,
                tuple(axis if isinstance(axis, int) or axis in DYNAMIC_AXES else sizes[axis] for axis in tensor.shape),
            )
            for tensor in tensors
            if FEATURE_TENSORS.get(tensor.name) in (None, *features)
        )

    graph = GRAPHS[name]
    return GraphSpec(name, fill(graph.inputs), fill(graph.outputs))
