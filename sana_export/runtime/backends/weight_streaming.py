"""How many of an engine's weights stay on the GPU in memory mode "streaming". The others come from the host in every run.

NVIDIA's documentation ("Weight Streaming"): the budget counts the bytes that stay on the device, and work that streams weights
cannot be captured in a CUDA graph. The budget is set before contexts are made. The module's own automatic budget is not used: its
Python binding returns a 32-bit number, which is wrong from 2 GiB on.
"""

from __future__ import annotations

from typing import Any

#: The part of the free memory that weights may take. The rest is for tensors, captured work and the other engines of a stage.
USABLE = 0.75


def set_weight_budget(engine: Any, free: int) -> bool:
    """Keep as many weights of an `ICudaEngine` on the device as fit, if `free` bytes are free there. Returns whether it obeyed.

    Contexts of the engine are made afterwards. They work in `device_memory_size_v2` bytes at most, which are kept free.
    """
    engine.weight_streaming_budget_v2 = 0
    budget = weight_budget(engine.streamable_weights_size, engine.device_memory_size_v2, free)
    engine.weight_streaming_budget_v2 = budget
    # The binding drops the setter's answer, so only the value tells whether it was accepted.
    return bool(engine.weight_streaming_budget_v2 == budget)


def streams_weights(engine: Any) -> bool:
    """Whether some weights of an `ICudaEngine` come from the host in every run."""
    return bool(engine.weight_streaming_budget_v2 < engine.streamable_weights_size)


def weight_budget(weights: int, work: int, free: int) -> int:
    """The bytes of `weights` to keep on the device, if `free` bytes are free and a run works in `work` bytes."""
    return min(weights, max(0, int((free - work) * USABLE)))
