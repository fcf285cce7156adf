"""The bodies of requests and answers: OpenAI's fields and those that other servers add. Fields that are not here are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sana_export.numeric import MOST_SCALE

#: The largest seed of numpy and torch.
MOST_SEED = 2**63 - 1
#: Images of one request in OpenAI's API.
MOST_IMAGES = 10

Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]


class Fields(BaseModel):
    """Settings of all bodies of requests: no conversion of types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class GenerationBody(Fields):
    """The body of POST /v1/images/generations."""

    prompt: str = Field(min_length=1, description="What to draw.", examples=["a red apple"])
    model: str | None = Field(None, max_length=200, description="A name of /v1/models. Default: the server's first model.")
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES)] | None = Field(
        None, description="Images. They have the seeds seed, seed + 1, ... Default: 1."
    )
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = Field(
        None, description="WIDTHxHEIGHT in pixels, or auto: the model's native size."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: a file on this server that is deleted after a while. Default: b64_json."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="Default: png.")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg (default: 95) and webp (default: lossless) files."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="With stream: previews of each image while it is drawn. Default: 0."
    )
    quality: Quality | None = Field(None, description="Accepted for OpenAI's clients. It has no effect: see num_inference_steps.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Accepted for OpenAI's clients. It has no effect.")
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = Field(
        None, description="The same seed gives the same image. Default: a random one, which the answer says."
    )
    num_inference_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="Sampling steps. Default: the model's.")
    guidance_scale: Annotated[float, Field(ge=-MOST_SCALE, le=MOST_SCALE)] | None = Field(None, description="Default: the model's.")
    negative_prompt: str | None = Field(None, description="What not to draw.")
    pag_scale: Annotated[float, Field(ge=0, le=MOST_SCALE)] | None = Field(
        None, description="Perturbed attention guidance, if the model was exported with it. Default: 0."
    )
    scheduler: Annotated[str, Field(max_length=100)] | None = Field(
        None, description="A scheduler's short name, such as unipc. Default: the model's."
    )


class EditFields(GenerationBody):
    """The text fields of POST /v1/images/edits, whose files are `image` and `mask`."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="How much is drawn anew. Default: 0.6.")


class ImageItem(BaseModel):
    """One image of an answer."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class ImagesAnswer(BaseModel):
    """The answer of both routes."""

    created: int
    data: list[ImageItem]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: Quality = "auto"
    size: str
    model: str
    #: Seconds by stage.
    timings: dict[str, float]


class ErrorItem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorItem


class ModelItem(BaseModel):
    """A model in OpenAI's form, with what this server can do with it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sana-export"
    loaded: bool
    edits: bool
    native_size: int


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelItem]
