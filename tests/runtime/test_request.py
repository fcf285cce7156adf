"""What follows from a request and a manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sana_export.errors import UsageError
from sana_export.manifest import Manifest
from sana_export.runtime.plan import make_plan, request_axes
from sana_export.runtime.request import Request


@pytest.mark.parametrize("factor", [16, 64])
def test_sizes_are_checked_against_the_factor_of_the_manifest(tiny_bundle: Path, factor: int) -> None:
    manifest = Manifest.load(tiny_bundle)
    manifest = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, vae_scale_factor=factor))
    plan = make_plan(Request("a cat", height=5 * factor, width=6 * factor, use_resolution_binning=False), tiny_bundle, manifest)
    assert plan.latents_shape[2:] == (5, 6)
    axes = request_axes(plan, manifest)
    assert (axes["image_height"], axes["image_width"]) == (5 * factor, 6 * factor)
    with pytest.raises(UsageError, match=f"multiples of {factor} ") as caught:
        make_plan(Request("a cat", height=factor, width=factor + 8, use_resolution_binning=False), tiny_bundle, manifest)
    assert caught.value.wanted == f"for example {factor}x{factor} or {factor}x{2 * factor}"
