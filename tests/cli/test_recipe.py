"""A recipe is read into dataclasses, or refused with the wrong key and what is allowed there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_export.cli.recipe import BenchSection, BuildSection, Recipe, SampleSection, VerifySection, load_recipe
from sana_export.errors import UsageError
from tests.support.command_line import Cli

RECIPES = Path(__file__).parents[2] / "engines"
HEAD = 'model = "tiny"\noutput = "x"\n'


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, "utf-8")
    return load_recipe(path)


def test_every_key_of_a_recipe(tmp_path: Path) -> None:
    found = recipe(
        tmp_path,
        """
        model = "sana-600m-1024px"
        output = "out/x"
        precision = "bf16"
        pag_layers = ["transformer_blocks.8"]
        clamp = true
        graphs = ["denoiser"]
        quantize = ["int8-weight", "denoiser=int4-weight"]
        revision = "main"
        variant = "fp16"
        transformer = "own.safetensors"
        lora = ["style.safetensors:0.7", "other"]
        [[build]]
        backend = "tensorrt"
        profile = "laptop"
        [[build]]
        compute_capabilities = ["8.9", "12.0"]
        height = 512
        width = 768
        batch = 2
        graphs = ["sampler"]
        [verify]
        backend = "onnxruntime"
        prompts = ["a", "b"]
        steps = 4
        guidance_scale = 1
        device = 1
        [sample]
        prompt = ["a cat", "a dog"]
        output = "out/x.png"
        seed = -1
        pag_scale = 2.0
        resolution_binning = false
        threads = 3
        [bench]
        workload = "laptop"
        backends = ["onnxruntime"]
        output = "out/report"
        device = 0
        threads = 4
        """,
    )
    assert found == Recipe(
        model="sana-600m-1024px",
        output=Path("out/x"),
        precision="bf16",
        pag_layers=("transformer_blocks.8",),
        clamp=True,
        graphs=("denoiser",),
        quantize=("int8-weight", "denoiser=int4-weight"),
        revision="main",
        variant="fp16",
        transformer=Path("own.safetensors"),
        lora=("style.safetensors:0.7", "other"),
        build=(
            BuildSection("tensorrt", "laptop"),
            BuildSection(compute_capabilities=("8.9", "12.0"), height=512, width=768, batch=2, graphs=("sampler",)),
        ),
        verify=VerifySection("onnxruntime", ("a", "b"), steps=4, guidance_scale=1.0, device=1),
        sample=SampleSection(("a cat", "a dog"), Path("out/x.png"), seed=-1, pag_scale=2.0, resolution_binning=False, threads=3),
        bench=BenchSection("laptop", ("onnxruntime",), Path("out/report"), device=0, threads=4),
        path=tmp_path / "recipe.toml",
    )


def test_a_stage_without_a_section_is_left_out(tmp_path: Path) -> None:
    found = recipe(tmp_path, HEAD)
    assert (found.build, found.verify, found.sample, found.bench) == ((), None, None, None)
    assert recipe(tmp_path, HEAD + "[build]\n").build == (BuildSection(),)


@pytest.mark.parametrize("name", ["tiny", "mid"])
def test_the_recipes_of_this_repository(name: str) -> None:
    found = load_recipe(RECIPES / f"{name}.toml")
    assert found.model == name
    assert found.output == Path("engines/out") / name
    assert found.bench is not None
    if name == "tiny":
        assert found.precision == "fp16"
        assert found.pag_layers
        assert [build.compute_capabilities for build in found.build] == [(), ("8.9",)]


@pytest.mark.parametrize(
    ("text", "found", "wanted"),
    [
        ('model = "tiny"', "no output", "model, output"),
        (HEAD + 'precison = "fp16"', "precison", "precision"),
        (HEAD + 'precision = "int8"', "int8", "fp32, fp16, bf16"),
        (HEAD + "pag_layers = 8", "8", "a list of strings"),
        (HEAD + 'quantize = ["nf4"]', "nf4", "int8-weight, int4-weight, int8, fp8, nvfp4"),
        (HEAD + "pag_layers = [8]", "[8]", "a list of strings"),
        (HEAD + 'clamp = "yes"', "'yes'", "true or false"),
        (HEAD + "build = 3", "3", "a TOML table"),
        (HEAD + 'path = "x"', "path", "model"),
        (HEAD + '[build]\nprofil = "laptop"', "profil", "profile"),
        (HEAD + '[build]\nprofile = "lapto"', "'lapto'", "datacenter"),
        (HEAD + '[build]\nbackend = "openvino"', "'openvino'", "tensorrt-rtx or tensorrt"),
        (HEAD + '[sample]\nprompt = "a"', "no output", "prompt, output"),
        (HEAD + '[sample]\nprompt = "a"\noutput = "x.tif"', "x.tif", ".png"),
        (HEAD + '[sample]\nprompt = "a"\noutput = "x.png"\nguidance = 4.5', "guidance", "guidance_scale"),
        (HEAD + '[sample]\nprompt = 3\noutput = "x.png"', "3", "a string or a list of strings"),
        (HEAD + '[sample]\nprompt = "a"\noutput = "x.png"\nsteps = 2.5', "2.5", "a whole number"),
        (HEAD + '[sample]\nprompt = "a"\noutput = "x.png"\nsteps = true', "True", "a whole number"),
        (HEAD + '[bench]\nworkload = "smoek"', "'smoek'", "smoke"),
        (HEAD + "[verify]\ndevice = -1", "-1", "from 0 to 1023"),
        (HEAD + '[sample]\nprompt = []\noutput = "a.png"', "[sample] of", "one or more str"),
        (HEAD + "[[build]]\nbatch = 1000000000", "batch in [build] of", "from 1 to 1024"),
        (HEAD + "[verify]\nsteps = 1000000000", "[verify] of", "from 1 to 1000"),
        (HEAD + '[sample]\nprompt = "x"\noutput = "a.png"\nsteps = 0', "[sample] of", "from 1 to 1000"),
        (HEAD + '[sample]\nprompt = "x"\noutput = "a.png"\nguidance_scale = nan', "nan", "from -1000 to 1000"),
        (HEAD + '[bench]\nworkload = "smoke"\nthreads = 0', "0", "from 1 to 1024"),
        (HEAD + "[verify]\nthreads = 1.5", "1.5", "a whole number"),
        (HEAD + "[[verify]]\nsteps = 2", "[{'steps': 2}]", "a TOML table"),
        ("model = ", "Invalid value", "engines/tiny.toml"),
    ],
)
def test_wrong_recipes_are_refused(text: str, found: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(tmp_path, text)
    assert found in str(caught.value)
    assert wanted in str(caught.value)


def test_a_missing_recipe_is_a_usage_error(tmp_path: Path, cli: Cli) -> None:
    ran = cli("engines", tmp_path / "none.toml")
    assert ran.code == 2
    assert "none.toml cannot be read as a recipe" in ran.err
