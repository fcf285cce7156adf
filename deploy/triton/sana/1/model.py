"""Draws with a bundle in Triton's Python backend. config.pbtxt names the inputs, which are parameters of `sana_export.Request`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sana_export import SanaRuntime
from sana_export.errors import SanaExportError, UsageError
from sana_export.runtime import Request

#: Input to what Python makes of its elements.
INPUTS = {
    "prompt": bytes.decode,
    "negative_prompt": bytes.decode,
    "height": int,
    "width": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "seed": int,
}


class TritonPythonModel:
    """One instance of the model: a bundle on one device."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that the configuration names, on the GPU that Triton chose, if it chose one."""
        config = json.loads(args["model_config"])
        words = {name: value["string_value"] for name, value in config["parameters"].items()}
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        try:
            self.runtime = SanaRuntime.from_pretrained(words["bundle"], backend=words["backend"], device=device)
        except SanaExportError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.batch_size = config["max_batch_size"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """The responses of the requests, whose images are drawn together if their sizes and settings are equal."""
        asked = [_images(request) for request in requests]
        flat = [image for own in asked if not isinstance(own, UsageError) for image in own]
        drawn = self.runtime.generate_many(
            flat, batch_size=self.batch_size, return_errors=True, cancelled=lambda: all(map(_is_cancelled, requests))
        )
        try:
            outcomes = iter(list(drawn))
        except SanaExportError as error:  # memory ran out, or all clients went away
            return [_failure(error) for _ in requests]
        return [_failure(own) if isinstance(own, UsageError) else _response([next(outcomes) for _ in own]) for own in asked]

    def finalize(self) -> None:
        """Release the memory of the bundle."""
        self.runtime.close()


def _images(request: Any) -> list[Request] | UsageError:
    """The images that a request asks for, one for each element of its batch, or what is wrong with it."""
    given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
    try:
        columns = {
            name: [INPUTS[name](value) for value in tensor.as_numpy().reshape(-1).tolist()]
            for name, tensor in given.items()
            if tensor is not None
        }
        return [Request(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    except UnicodeDecodeError as error:
        return UsageError("a prompt is not UTF-8", found=error)
    except UsageError as error:
        return error


def _response(results: list[Any]) -> Any:
    """The images uint8 [B, height, width, 3] and the seeds int64 [B, 1] of one request."""
    if error := next((result for result in results if isinstance(result, SanaExportError)), None):
        return _failure(error)
    images = [np.asarray(result.images[0]) for result in results]
    if len({image.shape for image in images}) > 1:
        return _failure(UsageError("the images of one request have different sizes", wanted="one height and width"))
    seeds = np.array([[result.seeds[0]] for result in results], np.int64)
    return pb_utils.InferenceResponse([pb_utils.Tensor("image", np.stack(images)), pb_utils.Tensor("seed", seeds)])


def _failure(error: SanaExportError) -> Any:
    """An error for the client: what is wrong with a request. The rest names folders of the server and stays in Triton's log."""
    if isinstance(error, UsageError):
        text = str(error)
    else:
        pb_utils.Logger.log_error(str(error))
        text = "the image could not be drawn"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text))


def _is_cancelled(request: Any) -> bool:
    return bool(request.is_cancelled())
