"""What the stand-ins for a pipeline's components share: they look like the component and refuse what a bundle cannot do.

A stand-in is an instance of the component's own class on PyTorch's meta device: it has every submodule, name and config, and no
weights. So diffusers' code finds what it looks for, such as the attention processors of PAG. The stand-in's methods run the graphs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from sana_export.commands import export_command
from sana_export.errors import UsageError
from sana_export.integrations.diffusers.tensors import Exchange, exchange_with
from sana_export.runtime.pipeline import SanaRuntime

_LORA = "use.runtime.load_lora(path, scale), where `use = use_bundle(pipe, bundle)`; or at the export: sana-export export --lora"
_UNLOAD = "use.runtime.unload_lora(), where `use = use_bundle(pipe, bundle)`"
_GRADIENT = "train the pipeline's own modules"
_COMPILE = "no torch.compile: the graphs are compiled already. backend='torch-compile' compiles them with PyTorch"
_MEMORY = "use_bundle(pipe, bundle, memory='staged'), which keeps one stage at a time in memory"
_ATTENTION = "the attention of the bundle's graphs, or the pipeline's own modules"
_WEIGHTS = "the pipeline's own modules: the stand-in has no weights"

#: Methods of diffusers' and transformers' models that a bundle cannot follow, and what to use instead.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("load_lora_adapter", "save_lora_adapter", "load_adapter", "add_adapter", "set_adapter", "set_adapters"), _LORA
    ),
    **dict.fromkeys(("fuse_lora", "unfuse_lora", "enable_lora", "disable_lora", "delete_adapters", "enable_lora_hotswap"), _LORA),
    **dict.fromkeys(("enable_adapters", "disable_adapters"), _LORA),
    "unload_lora": _UNLOAD,
    **dict.fromkeys(("enable_gradient_checkpointing", "gradient_checkpointing_enable"), _GRADIENT),
    **dict.fromkeys(("compile", "compile_repeated_blocks"), _COMPILE),
    **dict.fromkeys(("enable_group_offload", "enable_layerwise_casting", "enable_parallelism"), _MEMORY),
    **dict.fromkeys(("fuse_qkv_projections", "unfuse_qkv_projections", "set_attention_backend"), _ATTENTION),
    **dict.fromkeys(("enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"), _ATTENTION),
    **dict.fromkeys(("state_dict", "load_state_dict", "save_pretrained", "push_to_hub"), _WEIGHTS),
}
#: The same of pipelines.
REFUSED_BY_PIPELINES: dict[str, str] = {
    **dict.fromkeys(("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"), _MEMORY),
    **dict.fromkeys(("save_pretrained", "push_to_hub"), _WEIGHTS),
}
#: Where PyTorch and diffusers keep the hooks of a module.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_diffusers_hook")
#: Methods that some libraries replace in an instance.
_REPLACED = ("forward", "encode", "decode")
Own = TypeVar("Own", bound="BundleModule")


def graph_call(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a stand-in that runs graphs: checked, and without gradients."""

    @torch.compiler.disable  # it cannot trace a backend's work
    @functools.wraps(method)
    def call(self: BundleModule, *args: Any, **kwargs: Any) -> Any:
        self.check_call((*args, *kwargs.values()))
        self.check_untouched()
        with torch.no_grad():
            return method(self, *args, **kwargs)

    return call


def refusal(what: str, instead: str) -> UsageError:
    """The error for something that a bundle cannot do."""
    return UsageError(
        f"{what} has no effect on a pipeline that runs a bundle",
        found="a component that use_bundle put there",
        wanted=instead,
        fix="restore(pipe) brings the pipeline's own modules back",
    )


def refusing(name: str, instead: str) -> Callable[..., NoReturn]:
    """A method that raises UsageError."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise refusal(f"{name}()", instead)

    refuse.__name__ = name
    return refuse


def members(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """The name and the attributes of a module and of each of its submodules; the module is the first."""
    return [(name or "it", vars(part)) for name, part in module.named_modules()]


def hooked(parts: Iterable[tuple[str, dict[str, Any]]]) -> str | None:
    """The name of the first of `parts` that has a hook or a replaced method; None if there is none."""
    for name, own in parts:
        if any(own.get(hook) for hook in _HOOKS) or any(method in own for method in _REPLACED):
            return name
    return None


class BundleModule(nn.Module):
    """Base of the stand-ins, in front of the component's class."""

    runtime: SanaRuntime
    exchange: Exchange
    #: What it stands in for, in a list so that PyTorch does not take it for a submodule.
    _original: list[nn.Module]
    #: Its submodules, as `members` gives them: to find them anew in each call takes milliseconds.
    _parts: list[tuple[str, dict[str, Any]]]

    def attach(self: Own, name: str, use: Any, original: nn.Module) -> Own:
        """Stand in for `original`, the component `name` of `use.pipe`, with the runtime of `use`. Returns itself."""
        self.component, self.use, self.runtime, self.exchange = name, use, use.runtime, exchange_with(use.runtime.backend)
        self._original = [original]
        self._parts = members(self)[1:]
        self.eval()
        return self

    if TYPE_CHECKING:  # the attributes of the component's class

        def __getattr__(self, name: str) -> Any: ...

    @property
    def original(self) -> nn.Module:
        """What it stands in for."""
        return self._original[0]

    @property
    def device(self) -> torch.device:
        """Where the bundle's backend computes, as far as PyTorch can reach it."""
        return self.exchange.device

    @property
    def dtype(self) -> torch.dtype:
        """Graphs take and give float32. The precision inside is the bundle's (docs/numerics.md)."""
        return torch.float32

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return itself. Raises UsageError for another device or precision than the bundle's."""
        load = f"use_bundle(pipe, {str(self.runtime.bundle)!r}"
        check_moves((*args, *kwargs.values()), self.device, self.runtime, load)
        return self

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        return self.to(*(args or kwargs.values() or ("cuda",)))

    def cpu(self) -> Any:
        return self.to("cpu")

    def half(self, *_: Any) -> Any:
        return self.to(torch.float16)

    def float(self, *_: Any) -> Any:
        return self.to(torch.float32)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def double(self) -> Any:
        return self.to(torch.float64)

    def train(self: Own, mode: bool = True) -> Own:
        if mode:
            raise refusal("train()", _GRADIENT)
        self.training = False
        return self

    def requires_grad_(self: Own, requires_grad: bool = True) -> Own:
        if requires_grad:
            raise refusal("requires_grad_()", _GRADIENT)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":
            raise refusal("an offloading hook", _MEMORY)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        copy.deepcopy(self.runtime, memo)  # says what to do instead
        raise AssertionError("a runtime was copied")

    def check_call(self, values: Iterable[Any]) -> None:
        """Raise UsageError for a call with these parameters if it needs a gradient or comes from torch.compile's wrapper."""
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise refusal("a gradient", _GRADIENT)
        held = getattr(self.use.pipe, self.component, None)
        if getattr(held, "_orig_mod", None) is self:
            raise refusal("torch.compile()", _COMPILE)

    def check_neutral(self, **parameters: Any) -> None:
        """Raise UsageError for a parameter that the graphs do not have, unless it is None or False."""
        for name, value in parameters.items():
            if value is not None and value is not False:
                raise refusal(f"{name}= of {self.component}", f"no {name}")

    def check_untouched(self) -> None:
        """Raise UsageError if somebody put hooks into the submodules or replaced their methods, which do not run."""
        if (name := hooked(self._parts)) is not None:
            raise refusal(f"a hook in {self.component}.{name}", "a hook on the component itself, or on the pipeline's own modules")


for _name, _instead in REFUSED.items():
    setattr(BundleModule, _name, refusing(_name, _instead))


def check_moves(values: Iterable[Any], own: torch.device, runtime: SanaRuntime, load: str) -> None:
    """Raise UsageError if the parameters of a call of `to` ask for another device than `own` or another precision.

    load: the beginning of the call that loads the bundle, with its first parameters, for the error.
    """
    for value in values:
        if isinstance(value, Tensor):
            value = value.device
        if isinstance(value, torch.dtype):
            check_dtype(value, runtime, f".to({value})")
        elif isinstance(value, str | torch.device) or (isinstance(value, int) and not isinstance(value, bool)):
            _check_device(torch.device(f"cuda:{value}" if isinstance(value, int) else value), own, runtime, load)


def check_dtype(dtype: torch.dtype, runtime: SanaRuntime, word: str) -> None:
    """Raise UsageError for another precision than the bundle's. `word` is what asks for it in the caller's script."""
    options = runtime.manifest.options
    if dtype != getattr(torch, options.dtype):
        precisions = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        wanted = precisions.get(str(dtype).removeprefix("torch."))
        export = "" if wanted is None else f", or {export_command(runtime.bundle, runtime.manifest, precision=wanted)}"
        raise UsageError(
            f"{runtime.bundle} cannot change its precision",
            found=str(dtype),
            wanted=f"torch.{options.dtype}, the precision that it was exported in",
            fix=f"leave out {word}{export}",
        )


def _check_device(asked: torch.device, own: torch.device, runtime: SanaRuntime, load: str) -> None:
    """Raise UsageError for another device than the one that the bundle runs on."""
    if asked.type != own.type or (asked.index is not None and asked.index != (own.index or 0)):
        raise UsageError(
            f"{runtime.bundle} cannot be moved: it runs on the {own} with the backend {runtime.backend.name}",
            found=f"{asked}",
            wanted=f"{own}, or the bundle loaded for {asked}",
            fix=load + (f", device={asked.index or 0})" if asked.type == "cuda" else ", backend='onnxruntime')"),
        )
