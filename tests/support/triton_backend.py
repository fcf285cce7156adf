"""A stand-in for `triton_python_backend_utils`, as strict as Triton: tensors must be what the model's configuration declares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

#: Triton's data types. A string is an array of bytes objects.
DTYPES = {
    "TYPE_STRING": np.object_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
    "TYPE_UINT8": np.uint8,
}


@dataclass(frozen=True)
class Declared:
    """An input or output of a configuration."""

    data_type: str
    dims: tuple[int, ...]
    optional: bool = False

    def check(self, name: str, array: Any) -> None:
        """`array` is [batch, *dims] of the type."""
        assert array.dtype == DTYPES[self.data_type], f"{name} is {array.dtype}, not {self.data_type}"
        shape = array.shape[1:]
        assert len(shape) == len(self.dims), f"{name} has the shape {array.shape}, not [batch, {self.dims}]"
        assert all(wanted in (-1, found) for wanted, found in zip(self.dims, shape, strict=True)), f"{name} is {array.shape}"


@dataclass(frozen=True)
class ModelFile:
    """What `config.pbtxt` says, as far as the Python backend reads it."""

    max_batch_size: int
    parameters: Mapping[str, str]
    inputs: Mapping[str, Declared]
    outputs: Mapping[str, Declared]

    @classmethod
    def read(cls, path: Path) -> ModelFile:
        text = re.sub(r"#.*", "", path.read_text("utf-8"))
        parts = {kind: re.search(rf"^{kind} \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1] for kind in ("input", "output")}  # type: ignore[index]
        pattern = r'\{ name: "(\w+)" data_type: (\w+) dims: \[ ([-\d, ]+) \]( optional: true)? \}'
        found = {
            kind: {
                name: Declared(dtype, tuple(map(int, dims.split(","))), bool(optional))
                for name, dtype, dims, optional in re.findall(pattern, part)
            }
            for kind, part in parts.items()
        }
        assert sum(map(len, found.values())) == sum(part.count("name:") for part in parts.values())
        parameters = dict(re.findall(r'parameters \{ key: "(\w+)" value \{ string_value: "([^"]*)" \} \}', text))
        most = int(re.search(r"^max_batch_size: (\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        return cls(most, parameters, found["input"], found["output"])

    def arguments(self, **parameters: str) -> dict[str, str]:
        """What `initialize` is given, with other values of some parameters."""
        values = {name: {"string_value": value} for name, value in {**self.parameters, **parameters}.items()}
        config = {"max_batch_size": self.max_batch_size, "parameters": values}
        return {"model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0"}

    def request(self, **arrays: Any) -> InferenceRequest:
        """A request with these inputs, checked as Triton checks it."""
        for name, array in arrays.items():
            self.inputs[name].check(name, array)
        assert all(name in arrays for name, declared in self.inputs.items() if not declared.optional)
        return InferenceRequest({name: Tensor(name, array) for name, array in arrays.items()})


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, np.ascontiguousarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


@dataclass
class InferenceRequest:
    inputs: dict[str, Tensor]
    cancelled: bool = False

    def is_cancelled(self) -> bool:
        return self.cancelled


class TritonError:
    def __init__(self, message: str) -> None:
        assert isinstance(message, str)
        self._message = message

    def message(self) -> str:
        return self._message


class TritonModelException(Exception):
    pass


@dataclass
class InferenceResponse:
    output_tensors: Sequence[Tensor] = ()
    error: TritonError | None = None

    def arrays(self, model: ModelFile) -> dict[str, Any]:
        """The outputs, checked against the configuration."""
        assert self.error is None, self.error.message()
        arrays = {tensor.name(): tensor.as_numpy() for tensor in self.output_tensors}
        assert set(arrays) == set(model.outputs)
        for name, array in arrays.items():
            model.outputs[name].check(name, array)
        return arrays


@dataclass
class Logger:
    errors: list[str] = field(default_factory=list)

    def log_error(self, text: str) -> None:
        self.errors.append(text)


def install(monkeypatch: Any) -> ModuleType:
    """Make the stand-in importable under Triton's name."""
    module = ModuleType("triton_python_backend_utils")
    module.__dict__.update(
        Tensor=Tensor,
        InferenceRequest=InferenceRequest,
        InferenceResponse=InferenceResponse,
        TritonError=TritonError,
        TritonModelException=TritonModelException,
        Logger=Logger(),
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
