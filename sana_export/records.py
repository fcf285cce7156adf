"""The entries of a bundle's manifest: its graphs, engines, checkpoint and options (manifest.py reads and writes them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sana_export.contract import GraphSpec
from sana_export.files import FileEntry
from sana_export.quantization.layers import part_of
from sana_export.quantization.schemes import BITS

#: The precisions that a bundle can be exported in, with the dtype of each.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class LoraTarget:
    """Where a layer of the transformer is stored in a graph, so that the runtime can add a LoRA to it (runtime/lora.py).

    A layer whose rows are not stored together has one target for each part.
    """

    #: The layer's name in diffusers.
    module: str
    #: The shape of the layer's weight: [out, in] or [out, in, 1, 1].
    shape: tuple[int, ...]
    #: The graph's initializer that contains the weight.
    initializer: str
    #: The shape of the whole initializer.
    initializer_shape: tuple[int, ...]
    #: The dtype of the initializer, as in formats/dtypes.py.
    dtype: str
    #: The initializer's row, or column if `transposed`, that the weight starts at.
    row_offset: int = 0
    #: Whether the weight's rows are columns of the initializer.
    transposed: bool = False
    #: The number that the stored weight is multiplied by.
    factor: float = 1.0
    #: First and end of the weight's rows that are stored here. None: all of them.
    source_rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that a graph stores as numbers of a small type, `<name>.quantized`, and scales, `<name>.scale`.

    The other fields say what its layer has besides (docs/bundle.md).
    """

    #: Its name in the graph, where it is the output of the dequantization.
    name: str
    #: The type of the small numbers: "int8", "int4", "fp8" or "fp4".
    dtype: str
    #: The shape of the small numbers.
    shape: tuple[int, ...]
    #: The axis of the small numbers that the scales go along.
    axis: int
    #: How many small numbers along the axis share a scale. 0: each index of the axis has one scale.
    block: int = 0
    #: The small numbers are stored as [in, out], and the weight is [out, in] or [out, in, 1, 1].
    transposed: bool = False
    #: Whether each number is the nearest one to the checkpoint's. If not, it may be further away than half a step of its scale.
    nearest: bool = True
    #: The type that the layer's input is rounded to, with the scale `<name>.input.scale`. "": the graph's precision.
    inputs: str = ""
    #: Whether the layer's input is multiplied by the factors `<name>.input.factor` first.
    rescaled: bool = False
    #: Rank of the branch that is added to the layer's output, `<name>.low_rank.down` and `.up`. 0: none.
    rank: int = 0
    #: The weight of the layer whose rounded input this one reads too: `input.scale` and `input.factor` have that name. "": none.
    shares: str = ""

    @property
    def on_the_right(self) -> bool:
        """Whether the layer is a product with this weight as the right factor, also if it was a 1x1 convolution."""
        return bool(self.inputs) or self.dtype == "fp4"

    @property
    def input_bits(self) -> int:
        """Bits of the layer's rounded input. 16: it is not rounded."""
        return BITS.get(self.inputs, 16)

    def tensors(self, dtype: str) -> dict[str, str]:
        """The type of each other tensor of its layer in a graph of `dtype`, by the end of its name.

        The scales of FP4 numbers are FP8 numbers, whose own scale, `<name>.tensor_scale`, is in float32.
        """
        blocks = self.dtype == "fp4"
        present = {
            "scale": "fp8" if blocks else dtype,
            "tensor_scale": "float32" if blocks else "",
            "input.scale": "float32" if self.inputs == "fp4" else dtype if self.inputs else "",
            "input.factor": dtype if self.rescaled else "",
            "low_rank.down": dtype if self.rank else "",
            "low_rank.up": dtype if self.rank else "",
        }
        return {end: kind for end, kind in present.items() if kind}

    def tensor_name(self, end: str) -> str:
        """The name in the graph of the layer's tensor with this end, one of `tensors`."""
        return f"{self.shares if self.shares and end.startswith('input.') else self.name}.{end}"


def check_weight(weight: QuantizedWeight) -> None:
    """Raise ValueError unless a layer can be stored like this."""
    fits = (
        weight.dtype in BITS
        and weight.inputs in ("", "int8", "fp8", "fp4")
        and 0 <= weight.axis < len(weight.shape)
        and all(size > 0 for size in weight.shape)
        and (weight.block == 0 or (weight.block > 0 and weight.shape[weight.axis] % weight.block == 0))
        and (weight.rank == 0 or (weight.rank > 0 and len(weight.shape) == 2))
    )
    if not fits:
        raise ValueError(f"{weight.name} is stored as {weight}")


@dataclass(frozen=True)
class GraphEntry:
    """One exported graph."""

    #: Its inputs and outputs, with the checkpoint's dimensions filled in.
    spec: GraphSpec
    #: The ONNX file.
    onnx: FileEntry
    #: The files that the ONNX file reads its weights from.
    data: tuple[FileEntry, ...]
    #: The version of ONNX's operator set.
    opset: int
    #: Count of numbers in all initializers.
    parameters: int
    #: Where the transformer's layers are stored in it. Empty if the graph cannot take a LoRA.
    lora_targets: tuple[LoraTarget, ...] = ()
    #: The weights that it stores quantized.
    quantized: tuple[QuantizedWeight, ...] = ()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All of its files."""
        return (self.onnx, *self.data)


@dataclass(frozen=True)
class EngineEntry:
    """One serialized engine.

    A `refittable` engine contains no weights. It gets them when it is loaded, from the `data` files of the graph's entry, so one
    engine fits every checkpoint of the same structure.
    """

    #: The graph that it was built from.
    graph: str
    #: The backend that it was built for.
    backend: str
    #: Hash of everything that changes the engine.
    key: str
    #: The engine's file.
    file: FileEntry
    #: Hash of the graph's ONNX file and its data; of the graph's structure alone if the engine is refittable.
    onnx_sha256: str
    #: The version of TensorRT or TensorRT-RTX that built it.
    backend_version: str
    #: The compute capabilities of the GPUs that it runs on, such as "8.9". Empty: a portable engine.
    compute_capabilities: tuple[str, ...]
    #: The platform that it runs on, such as "linux-x86_64"; "any" if that does not matter.
    operating_system: str
    #: The profile that it was built for.
    profile: str
    #: Minimum, optimum and maximum of every dynamic axis.
    ranges: Mapping[str, tuple[int, int, int]]
    #: `tf32`, and every other build option that was set.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: How long the build took.
    build_seconds: float = 0.0
    #: Peak host memory of the process that built it. 0: not measured.
    build_peak_bytes: int = 0
    #: GPU memory that a run needs for activations at the largest shapes. 0: unknown.
    activation_bytes: int = 0

    @property
    def refittable(self) -> bool:
        """Whether it gets its weights when it is loaded."""
        return bool(self.options.get("refittable"))


@dataclass(frozen=True)
class Overlay:
    """Weights that replace, change or join a checkpoint's: a transformer, an autoencoder, a ControlNet or a LoRA."""

    #: The path or name that the user gave.
    path: str
    #: Hash of what was read from it.
    sha256: str
    #: The factor on it.
    scale: float = 1.0
    #: Other factors for some layers of a LoRA, by pattern (lora_scales.py).
    layer_scales: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint that a bundle was exported from."""

    #: The alias, hub id or folder that the user gave.
    source: str
    #: The hub revision that the user gave. None: the default one, or a checkpoint that is not on the hub.
    revision: str | None
    #: Hash of the contents of all weight and config files, and of the overlays.
    sha256: str
    #: The alias of its row in variants.py. None if it has none.
    variant: str | None
    #: Whether the weights are random.
    synthetic: bool
    #: The weight files that the user asked for, such as "fp16".
    weights_variant: str | None = None
    #: Whether it was trained with self-attention outputs clipped to +-65504.
    clamp: bool = False
    #: The transformer weights that replaced the checkpoint's own.
    transformer: Overlay | None = None
    #: The LoRAs that were folded into the weights.
    loras: tuple[Overlay, ...] = ()
    #: The autoencoder that replaced the checkpoint's own: its alias, hub id or folder.
    vae: Overlay | None = None
    #: The ControlNet that was exported with it: its alias, hub id, folder or file.
    controlnet: Overlay | None = None


@dataclass(frozen=True)
class Options:
    """How a bundle was exported."""

    #: fp32, fp16 or bf16.
    precision: str
    #: Whether self-attention outputs are clipped to +-65504.
    clamp: bool
    #: The transformer blocks that can sample with perturbed attention guidance.
    pag_layers: tuple[int, ...] = ()
    #: The quantization scheme of each part that has one (quantization/).
    quantize: Mapping[str, str] = field(default_factory=dict)
    #: How quantized numbers were chosen, in the words of `--quantize-method`. Empty: by each scheme's own method.
    quantize_method: tuple[str, ...] = ()
    #: Hash of the calibration that they were chosen with. "": none.
    calibration: str = ""
    #: The file with the calibration, as the user named it. "": the export measured it.
    calibration_file: str = ""

    def scheme(self, graph: str) -> str | None:
        """The scheme of a graph's weights. None: the precision."""
        return self.quantize.get(part_of(graph))

    @property
    def dtype(self) -> str:
        """The dtype of the precision."""
        return PRECISIONS[self.precision]


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime has to know about the checkpoint, beyond the shapes of its graphs."""

    #: Height and width of the native latents.
    sample_size: int
    #: Channels of the latents.
    latent_channels: int
    #: Image pixels per latent pixel, in each direction.
    vae_scale_factor: int
    #: The denoiser's factor on the scheduler's timesteps.
    timestep_scale: float
    #: Width of the prompt embeddings.
    text_channels: int
    #: Rows of the embedding table.
    embedding_rows: int
    #: The checkpoint's scheduler config.
    scheduler: Mapping[str, Any]
    #: The text that is put before every prompt.
    instruction: str
    #: The longest prompt in tokens.
    max_sequence_length: int
    #: Sampling steps if a request does not say.
    default_steps: int
    #: Guidance scale if a request does not say.
    default_guidance_scale: float
    #: Whether the denoiser takes the guidance scale as an input instead of running guidance branches (SANA-Sprint).
    guidance_embeds: bool = False
    #: How many neighboring features on each side an image pixel of `vae_decoder_tail` depends on.
    decoder_tile_halo: int = 0
    #: Image pixels per feature of `vae_decoder_head`, in each direction.
    decoder_tile_scale: int = 1
    #: How many neighboring features on each side a feature of `vae_encoder_head` depends on. 0 without the encoder's graphs.
    encoder_tile_halo: int = 0
    #: Image pixels per feature of `vae_encoder_head`, in each direction. 1 without the encoder's graphs.
    encoder_tile_scale: int = 1

    @property
    def native_size(self) -> int:
        """Height and width in pixels that the checkpoint was trained for."""
        return self.sample_size * self.vae_scale_factor
