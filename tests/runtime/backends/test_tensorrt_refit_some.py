"""Refits of some weights: exactly those change, or none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from sana_export.adapters import Lora
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.errors import ArtifactError
from sana_export.graphs.builders import build_graph
from sana_export.manifest import Manifest
from sana_export.runtime.backends.base import Backend
from sana_export.runtime.backends.tensorrt_refit import EngineRefitter, EngineWeights
from sana_export.runtime.lora import LoraStack
from tests.support.lora_files import diffusers_lora, load_transformer
from tests.support.refit_stand_in import COMMANDS, Engine, arrays, module

NAMES = ("blocks.0.qkv", "blocks.1.out.weight")


class Filled:
    """The engine of tiny's denoiser with its weights, its `EngineWeights` and new values for `NAMES`."""

    def __init__(self, bundle: Path, *, combined: Any = (), **changes: Any) -> None:
        graph = Manifest.load(bundle).graphs["denoiser"]
        self.base = arrays(bundle, graph)
        self.engine = Engine(self.base, combined)
        EngineWeights(module(), self.engine, graph, bundle, **COMMANDS).fill()
        self.weights = EngineWeights(module(**changes), self.engine, graph, bundle, **COMMANDS)
        generator = np.random.default_rng(0)
        self.new = {name: generator.standard_normal(self.base[name].shape).astype(np.float32) for name in NAMES}

    def assert_holds(self, changed: dict[str, np.ndarray]) -> None:
        for name, value in {**self.base, **changed}.items():
            np.testing.assert_array_equal(self.engine.weights[name], value, err_msg=name)


def test_exactly_the_named_weights_change_and_come_back(tiny_bundle: Path) -> None:
    filled = Filled(tiny_bundle)
    filled.weights.refit(filled.new)
    filled.assert_holds(filled.new)
    filled.weights.refit({name: filled.base[name] for name in NAMES})
    filled.assert_holds({})


def test_weights_that_the_compiler_joined_are_given_as_they_are_now(tiny_bundle: Path) -> None:
    """Their present values are used, not the bundle's: another LoRA may have changed them."""
    filled = Filled(tiny_bundle, combined=[set(NAMES)])
    filled.weights.refit(filled.new)
    other = {NAMES[0]: filled.new[NAMES[0]] + 1}
    filled.weights.refit(other)
    filled.assert_holds({**filled.new, **other})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"refuses": NAMES[:1]}, "refuses weights(.|\n)*blocks.0.qkv; these weights are refused"),
        ({"forgets": ("blocks.2.qkv",)}, "weights are missing(.|\n)*blocks.2.qkv"),
        ({"works": [False, True]}, "the refit failed(.|\n)*out of device memory"),
    ],
)
def test_a_refit_that_fails_leaves_the_old_weights(changes: dict[str, Any], words: str, tiny_bundle: Path) -> None:
    filled = Filled(tiny_bundle, combined=[{NAMES[0], "blocks.2.qkv"}], **changes)
    with pytest.raises(ArtifactError, match=words) as caught:
        filled.weights.refit(filled.new)
    assert "engine of denoiser" in caught.value.message
    filled.assert_holds({})


def test_old_weights_that_cannot_be_restored_are_reported(tiny_bundle: Path) -> None:
    filled = Filled(tiny_bundle, works=[False, False])
    with pytest.raises(ArtifactError, match=r"some of its new weights") as caught:
        filled.weights.refit(filled.new)
    assert caught.value.fix == "load the bundle again"


def test_a_lora_reaches_the_engines_as_the_graphs_have_it_folded_in(
    tiny_bundle: Path, tiny_checkpoint: SanaCheckpoint, tmp_path: Path
) -> None:
    """All of it except the compiler: file, manifest, values, names. The engines get the weights of an export with the LoRA."""
    path = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path, r=4, lora_alpha=7)
    manifest, lora = Manifest.load(tiny_bundle), Lora(path, 0.7)
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=[lora])
    sessions: dict[str, Any] = {}
    engines: dict[str, tuple[Engine, dict[str, np.ndarray]]] = {}
    for name in ("context", "denoiser"):
        base = arrays(tiny_bundle, manifest.graphs[name])
        engines[name] = Engine(base), base
        sessions[name] = EngineWeights(module(), engines[name][0], manifest.graphs[name], tiny_bundle, **COMMANDS)
        sessions[name].fill()
    stack = LoraStack(
        cast(Backend, SimpleNamespace(bundle=tiny_bundle, manifest=manifest, can_refit=True, check_refit=lambda graph: None))
    )
    stack.add(lora, sessions)
    for name, (engine, base) in engines.items():
        changed = 0
        for key, value in build_graph(name, checkpoint, manifest.options).named_parameters():
            np.testing.assert_allclose(engine.weights[key], value.numpy(), rtol=1e-5, atol=1e-6, err_msg=key)
            changed += not np.array_equal(engine.weights[key], base[key])
        assert changed >= {"context": 2, "denoiser": 18}[name]
    stack.clear(sessions)
    for engine, base in engines.values():
        for key, value in base.items():
            np.testing.assert_array_equal(engine.weights[key], value, err_msg=key)


def test_names_and_sizes_are_checked_before_anything_is_set(tiny_bundle: Path) -> None:
    filled = Filled(tiny_bundle)
    with pytest.raises(ArtifactError, match=r"does not know weights(.|\n)*blocks\.77\.qkv"):
        filled.weights.refit({**filled.new, "blocks.77.qkv": np.zeros(3, np.float32)})
    with pytest.raises(ArtifactError, match=r"another size(.|\n)*blocks\.0\.qkv \(196608 bytes"):
        filled.weights.refit({NAMES[0]: np.zeros(3, np.float32)})
    filled.assert_holds({})


def test_an_engine_with_its_weights_inside_names_the_command_that_builds_another(tiny_bundle: Path) -> None:
    base = arrays(tiny_bundle, Manifest.load(tiny_bundle).graphs["denoiser"])
    engine = Engine(base, refittable=False)
    with pytest.raises(ArtifactError, match="built with its weights inside") as caught:
        EngineRefitter(module(), engine, "denoiser", build=COMMANDS["build"]).set_some({NAMES[0]: base[NAMES[0]]}, base)
    assert caught.value.fix == COMMANDS["build"]
    assert not engine.weights[NAMES[0]].any()
