"""SANA-Sprint from the checkpoint to a verified bundle."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.contract import FEATURE_TENSORS, GRAPH_GROUPS, resolve
from sana_export.errors import UsageError
from sana_export.export.bundle import export_bundle
from sana_export.export.parity import compare_images
from sana_export.manifest import Manifest
from sana_export.synth.checkpoint import make_checkpoint
from sana_export.synth.recipes import RECIPES
from sana_export.verify.bundle import Sampling, verify_bundle
from sana_export.verify.drawing import sample_both
from sana_export.verify.graph_checks import GRAPH_CHECKS
from sana_export.verify.reference import load_reference

QUICK = Sampling(prompts=["a red apple", "A cute 🐼 eating 🎋, 水墨画 style"], height=96, width=128)


def test_only_a_checkpoint_with_guidance_has_that_input(sprint_bundle, tiny_bundle):
    inputs = {tensor.name: tensor for tensor in Manifest.load(sprint_bundle).graphs["denoiser"].spec.inputs}
    assert (inputs["guidance"].dtype, inputs["guidance"].shape) == ("float32", (1,))
    assert "guidance" not in {tensor.name for tensor in Manifest.load(tiny_bundle).graphs["denoiser"].spec.inputs}
    sizes = dict.fromkeys(("latent_channels", "layers", "cross_attention_heads", "cross_attention_head_dim"), 2)
    plain, full = (resolve("denoiser", sizes, "float32", features) for features in ((), ("guidance_embeds",)))
    assert [tensor for tensor in full.inputs if tensor.name not in FEATURE_TENSORS] == list(plain.inputs)


def test_the_float32_bundle_passes(sprint_bundle, sprint_checkpoint, tmp_path):
    bundle = shutil.copytree(sprint_bundle, tmp_path / "b")
    report = verify_bundle(bundle, sprint_checkpoint, QUICK)
    assert report.passed, report.as_text()
    assert [row.name for row in report.graphs] == [name for name in GRAPH_CHECKS if name in GRAPH_GROUPS["default"]]
    assert min(row.cosine for row in report.graphs) >= 0.999999
    assert Manifest.load(bundle).parity == report.as_json()


@pytest.mark.parametrize("prompt", QUICK.prompts)
@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 4.5), (2, 0.5), (2, 1.0), (2, 7.0), (4, 4.5)])
def test_images_equal_the_reference(sprint_runtime, sprint_pipeline, prompt, steps, guidance_scale):
    sampling = dataclasses.replace(QUICK, steps=steps, guidance_scale=guidance_scale, seed=3)
    pair = sample_both(sprint_runtime, sprint_pipeline, sampling.request(prompt, sprint_runtime.manifest.model))
    assert pair.images[1].std() > 20
    parity = compare_images("image", *pair.images, "fp32")
    assert parity.passed, parity


def test_the_float16_bundle_of_an_unlisted_checkpoint_passes(tmp_path):
    """For a checkpoint that is not in the table. diffusers applies its guidance scale factor but no timestep scale."""
    recipe = RECIPES["tiny-sprint"]
    changed = {"guidance_embeds_scale": 0.25, "timestep_scale": 0.5}
    recipe = dataclasses.replace(recipe, transformer={**recipe.transformer, **changed})
    checkpoint = open_checkpoint(str(make_checkpoint(recipe, tmp_path / "checkpoint")))
    bundle = tmp_path / "bundle"
    model = export_bundle(checkpoint, bundle, precision="fp16").model
    assert (model.default_steps, model.guidance_embeds) == (2, True)
    report = verify_bundle(bundle, checkpoint, QUICK)
    assert report.backend.startswith("cpu, float16")
    assert report.passed, report.as_text()
    assert min(row.psnr_db for row in report.images) >= 40.0


def test_perturbed_attention_is_refused(sprint_checkpoint, sprint_bundle, tmp_path):
    with pytest.raises(UsageError, match="PAG") as caught:
        export_bundle(sprint_checkpoint, tmp_path / "b", precision="fp32", pag_layers=["transformer_blocks.1"])
    assert "transformer_blocks.1" in str(caught.value.found)
    assert "--pag-layers" in str(caught.value.fix)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="PAG"):
        load_reference(sprint_checkpoint, Manifest.load(sprint_bundle).options, pag=True)
