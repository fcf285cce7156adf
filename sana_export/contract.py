"""The tensors of every deployment graph: the one table that export, engine build and runtime use.

A dimension is a name. Names in `DYNAMIC_AXES` stay symbolic in the ONNX graph. All other names are properties of the checkpoint,
and `resolve` replaces them with their numbers. The dtype `PRECISION` is the one that the bundle is exported in. Tensors that the
host reads or writes are float32 or integers. Tensors that stay on the device between two graphs are in PRECISION.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

#: The longest instruction and prompt together. An attention window of at least this width has no effect.
MAX_TOKENS = 2048

#: The graphs that decode images in one piece (False) and in tiles (True).
DECODERS: dict[bool, set[str]] = {False: {"vae_decoder"}, True: {"vae_decoder_head", "vae_decoder_tail"}}
#: The graphs that encode images in one piece (False) and in tiles (True).
ENCODERS: dict[bool, set[str]] = {False: {"vae_encoder"}, True: {"vae_encoder_head", "vae_encoder_tail"}}

PRECISION = "precision"

#: Axes whose lengths depend on the request. latent_* are in latent pixels (1/32 of the image's), feature_* and tile_* in features
#: of the decoder, encoded_* and window_* in features of the encoder, and image_*, output_*, tile_image_* and window_image_* in
#: image pixels. Guidance branches with a prompt of their own are text branches.
DYNAMIC_AXES = (
    "batch",
    "branches",
    "text_branches",
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
    "encoded_height",
    "encoded_width",
    "window_height",
    "window_width",
    "window_image_height",
    "window_image_width",
)

Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    #: Its name in the ONNX graph.
    name: str
    #: Its dtype (formats/dtypes.py), or `PRECISION` before `resolve`.
    dtype: str
    #: Names of axes, and numbers.
    shape: Shape


@dataclass(frozen=True)
class GraphSpec:
    """One deployment graph."""

    #: Its name.
    name: str
    #: Its inputs in order.
    inputs: tuple[TensorSpec, ...]
    #: Its outputs in order.
    outputs: tuple[TensorSpec, ...]


LATENTS: Shape = ("batch", "latent_channels", "latent_height", "latent_width")
FEATURES: Shape = ("batch", "feature_channels", "feature_height", "feature_width")
_CONTEXT: Shape = (2, "text_branches", "batch", "cross_attention_heads", "text_tokens", "cross_attention_head_dim")
CONTEXT: Shape = ("layers", *_CONTEXT)
CONTROLNET_CONTEXT: Shape = ("controlnet_layers", *_CONTEXT)
RESIDUALS: Shape = ("controlnet_layers", "text_branches", "batch", "latent_height", "latent_width", "channels")


def _f32(name: str, *shape: str | int) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


#: The sampler's inputs for the x0 of earlier steps: of the step before, of the one before that, and so on.
HISTORY = ("previous_x0", "previous_x0_2", "previous_x0_3")
#: The elements of the sampler's `coefficients` input, which are the columns of a schedule:
#: x0 = x0_latents * latents + x0_noise_pred * noise_pred
#: next_latents = latents * latents + x0 * x0 + noise * noise + the sum over HISTORY of column * input
COEFFICIENTS = ("x0_latents", "x0_noise_pred", "latents", "x0", *HISTORY, "noise")

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
            (_f32("prompt_embeds", "text_branches", "batch", "text_tokens", "text_channels"),),
            (TensorSpec("context", PRECISION, CONTEXT),),
        ),
        GraphSpec(
            "denoiser",
            (
                _f32("latents", *LATENTS),
                _f32("timestep", 1),
                TensorSpec("context", PRECISION, CONTEXT),
                _f32("context_mask", "text_branches", "batch", "text_tokens"),
                _f32("perturbed", "branches"),
                TensorSpec("source", "int64", ("branches",)),
                _f32("guidance", 1),
                TensorSpec("residuals", PRECISION, RESIDUALS),
            ),
            (_f32("noise_pred", "branches", *LATENTS),),
        ),
        GraphSpec(
            "sampler",
            (
                _f32("noise_pred", "branches", *LATENTS),
                _f32("latents", *LATENTS),
                *(_f32(name, *LATENTS) for name in HISTORY),
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
        GraphSpec(
            "vae_encoder",
            (_f32("image", "batch", 3, "image_height", "image_width"),),
            (_f32("latents", *LATENTS),),
        ),
        GraphSpec(
            "vae_encoder_head",
            (_f32("window", "batch", 3, "window_image_height", "window_image_width"),),
            (_f32("window_features", "batch", "encoder_feature_channels", "window_height", "window_width"),),
        ),
        GraphSpec(
            "vae_encoder_tail",
            (_f32("features", "batch", "encoder_feature_channels", "encoded_height", "encoded_width"),),
            (_f32("latents", *LATENTS),),
        ),
        GraphSpec(
            "controlnet_context",
            (_f32("prompt_embeds", "text_branches", "batch", "text_tokens", "text_channels"),),
            (TensorSpec("controlnet_context", PRECISION, CONTROLNET_CONTEXT),),
        ),
        GraphSpec(
            "controlnet",
            (
                _f32("latents", *LATENTS),
                _f32("timestep", 1),
                _f32("control", *LATENTS),
                _f32("conditioning_scale", 1),
                TensorSpec("context", PRECISION, CONTROLNET_CONTEXT),
                _f32("context_mask", "text_branches", "batch", "text_tokens"),
            ),
            (TensorSpec("residuals", PRECISION, RESIDUALS),),
        ),
        GraphSpec(
            "blend",
            (
                _f32("latents", *LATENTS),
                _f32("image_latents", *LATENTS),
                _f32("noise", *LATENTS),
                _f32("mask", "batch", 1, "latent_height", "latent_width"),
                _f32("noise_level", 1),
            ),
            (_f32("blended", *LATENTS),),
        ),
    )
}

#: Graphs that use some of another graph's weights. They are in its folder and read its weight file.
WEIGHTS_OF = {
    "vae_decoder_head": "vae_decoder",
    "vae_decoder_tail": "vae_decoder",
    "vae_encoder_head": "vae_encoder",
    "vae_encoder_tail": "vae_encoder",
}

#: Names for several graphs, for `export --graphs`. "default" draws images from text. "img2img" adds what image-to-image and
#: inpainting need, "control" a ControlNet, whose control image goes through the encoder of "img2img".
GRAPH_GROUPS: dict[str, tuple[str, ...]] = {
    "default": (
        "text_encoder",
        "context",
        "denoiser",
        "sampler",
        "vae_decoder",
        "vae_decoder_head",
        "vae_decoder_tail",
        "postprocess",
    ),
    "img2img": ("vae_encoder", "vae_encoder_head", "vae_encoder_tail", "blend"),
    "control": ("controlnet_context", "controlnet"),
}
#: The group of each graph that is exported only on request.
OPTIONAL_GRAPHS: dict[str, str] = {graph: group for group, graphs in GRAPH_GROUPS.items() if group != "default" for graph in graphs}

#: Tensors that a graph has only with a feature: a switch of the transformer's config, of the export's options, or a
#: ControlNet.
FEATURE_TENSORS = {"guidance": "guidance_embeds", "source": "pag_layers", "residuals": "controlnet"}
#: Axes that are another axis without a feature: every branch has a prompt of its own unless there is a perturbed one.
FEATURE_AXES = {"text_branches": ("branches", "pag_layers")}


def resolve(name: str, dimensions: Mapping[str, int], precision: str, features: Collection[str] = ()) -> GraphSpec:
    """The graph `name` with the checkpoint's `dimensions` and its `precision` ("float32", "float16", "bfloat16") filled in.

    `features` are the features that the bundle has. Tensors of the others (`FEATURE_TENSORS`) are left out.
    """
    sizes = {"coefficients": len(COEFFICIENTS), **dimensions}
    merged = {axis: other for axis, (other, feature) in FEATURE_AXES.items() if feature not in features}

    def length(axis: str | int) -> str | int:
        axis = merged.get(axis, axis) if isinstance(axis, str) else axis
        return axis if isinstance(axis, int) or axis in DYNAMIC_AXES else sizes[axis]

    def fill(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                tensor.name,
                precision if tensor.dtype == PRECISION else tensor.dtype,
                tuple(map(length, tensor.shape)),
            )
            for tensor in tensors
            if FEATURE_TENSORS.get(tensor.name) in (None, *features)
        )

    graph = GRAPHS[name]
    return GraphSpec(name, fill(graph.inputs), fill(graph.outputs))
