"""The first part: what this machine has. Each library is imported in its own process, which may crash or hang."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from sana_export.bench.gpu_check.check import PartContext
from sana_export.errors import DependencyError
from sana_export.gpu_support import backends_for
from sana_export.machine import gpu_compute_capability, gpu_names, gpu_state
from sana_export.runtime.backends.onnxruntime_provider import CPU, CUDA, check_provider, choose_provider

#: Time limit for all libraries in seconds. They are asked at the same time; CUDA's take long to load for the first time.
_TIMEOUT = 60
#: Module to the expression that is evaluated after importing it as `m`. Its value must be valid in JSON; `no_gpu` says why the
#: module cannot use the GPU, or is None.
QUESTIONS: dict[str, str] = {
    "torch": "{'version': m.__version__, 'cuda': m.version.cuda, 'no_gpu': find.no_torch(m),"
    " 'gpu': m.cuda.get_device_name() if m.cuda.is_available() else None,"
    " 'gpu_bytes': m.cuda.mem_get_info()[1] if m.cuda.is_available() else None}",
    "diffusers": "{'version': m.__version__}",
    "transformers": "{'version': m.__version__}",
    "onnx": "{'version': m.__version__}",
    "onnxscript": "{'version': m.__version__}",
    "onnxruntime": "{'version': m.__version__, 'providers': m.get_available_providers(), 'no_gpu': find.no_cuda_provider(m)}",
    "onnxruntime_ep_nv_tensorrt_rtx": "{'version': m.__version__}",
    "tensorrt": "{'version': m.__version__}",
    "tensorrt_rtx": "{'version': m.__version__}",
    "cuda.core": "{'version': m.__version__}",
    "triton": "{'version': m.__version__}",
    "tokenizers": "{'version': m.__version__}",
    "pytest": "{'version': m.__version__}",
}


def find(context: PartContext) -> Mapping[str, Any]:
    """gpus, compute_capability (None without a GPU), gpu_state (`machine.gpu_state`), backends (those for this GPU), and modules:
    name to its answer, or to the error if it cannot be imported."""
    capability = gpu_compute_capability()
    backends = backends_for(capability) if capability else ()
    context.keep({"gpus": gpu_names(), "compute_capability": capability, "gpu_state": gpu_state(), "backends": backends})
    children = {name: _ask(name, question) for name, question in QUESTIONS.items() if installed(name)}
    deadline = time.monotonic() + _TIMEOUT
    return {"modules": {name: _answer(child, deadline) for name, child in children.items()}}


def no_torch(torch: Any) -> str | None:
    """Why PyTorch cannot use the GPU. None if it can."""
    return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} finds no GPU"


def no_cuda_provider(onnxruntime: Any) -> str | None:
    """Why a session of this ONNX Runtime does not run on the GPU. None if it does: a model of one node is loaded to see it."""
    if choose_provider(onnxruntime) == CPU:
        return f"this ONNX Runtime has no {CUDA} (install onnxruntime-gpu)"
    try:
        check_provider(onnxruntime, onnxruntime.InferenceSession(_one_node(), providers=[CUDA, CPU]), CUDA, "loading one node")
    except DependencyError as error:
        return str(error)
    return None


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "one-node", ends[:1], ends[1:])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())


def installed(name: str) -> bool:
    """Whether the module `name` is installed."""
    parent, _, _ = name.rpartition(".")
    return (not parent or installed(parent)) and importlib.util.find_spec(name) is not None


def _ask(name: str, question: str) -> subprocess.Popen[str]:
    program = f"import json, {name} as m; from {__name__.rpartition('.')[0]} import find; print('\\n' + json.dumps({question}))"
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _answer(child: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    try:
        output, errors = child.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer
    except subprocess.TimeoutExpired:
        child.kill()
        return {"error": f"no answer in {_TIMEOUT} s"}
    except (ValueError, IndexError):
        return {"error": (errors.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}
