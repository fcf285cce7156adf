"""examples/cpp, built and run as its README says, computes what the package computes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from sana_export import SanaRuntime
from sana_export.manifest import FORMAT, Manifest
from sana_export.runtime.noise import TorchGenerator
from sana_export.runtime.prompt import PromptEncoder
from sana_export.runtime.schedule import make_schedule
from tests.support.bundles import exported

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "A cute 🐼"
#: Folders that CMake gets from the environment. It finds headers in the system's folders without them.
FOLDERS = ("NLOHMANN_JSON_INCLUDE_DIR", "ONNXRUNTIME_ROOT", "ONNXRUNTIME_INCLUDE_DIR")
#: Pieces of prompts: merges, spaces, emoji and Chinese, bytes, words that look like tokens, and the space's own character.
PIECES = (
    *("a red apple", "the", "ing", "User Prompt: ", "▁▁", "  ", "\n\n\n", "\t", "\x01"),
    *("🐼", "👨‍👩‍👧", "🇩🇪", "一只可爱的猫", "É", "é", "𐍈", "ｆｕｌｌ", "مرحبا"),
    *("<bos>", "<pad>x", "<unk", "<0x41>", "<table>"),
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C++ example was tried on Linux only")


def wheel_library() -> Path | None:
    """The library in the wheel onnxruntime, so that both programs run the same one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)


@pytest.fixture(scope="session")
def program(build_cache: Path) -> Path:
    """`sana`, built."""
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no CMake and C++ compiler: apt-get install cmake g++")
    folder = build_cache / "cpp"
    given = {name: os.environ[name] for name in FOLDERS if name in os.environ}
    if "ONNXRUNTIME_ROOT" not in given and (library := wheel_library()) is not None:
        given["ONNXRUNTIME_LIBRARY"] = str(library)
    # Little optimization: half the time of the compiler.
    settings = {**given, "CMAKE_BUILD_TYPE": "None", "CMAKE_CXX_FLAGS": "-O1"}
    options = [f"-D{name}={value}" for name, value in settings.items()]
    shutil.rmtree(folder, ignore_errors=True)
    configured = finished("cmake", "-S", ROOT / "examples/cpp", "-B", folder, *options, code=None)
    if "NLOHMANN_JSON_INCLUDE_DIR" in configured.stderr:
        pytest.skip("no nlohmann/json.hpp: apt-get install nlohmann-json3-dev")
    if "ONNXRUNTIME_INCLUDE_DIR" in configured.stderr:
        pytest.skip(
            "no headers of ONNX Runtime: apt-get install libonnxruntime-dev (Debian 13), or set ONNXRUNTIME_ROOT to the folder of"
            " an unpacked release"
        )
    assert configured.returncode == 0, configured.stderr
    finished("cmake", "--build", folder)
    return folder / "sana"


@pytest.fixture(scope="session")
def sana(program: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `sana` with arguments."""
    return lambda *arguments, code=0: finished(program, *arguments, code=code)


@pytest.fixture(scope="session")
def parts(program: Path) -> Callable[..., str]:
    """Runs `sana --parts` with arguments and returns what it prints."""
    return lambda *arguments, text="": finished(program, "--parts", *arguments, text=text).stdout


def finished(*command: object, code: int | None = 0, text: str = "") -> subprocess.CompletedProcess[str]:
    # Not as text, which would change line ends.
    done = subprocess.run([*map(str, command)], input=text.encode(), capture_output=True, timeout=300, check=False)
    found = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert code is None or found.returncode == code, found
    return found


def whole_numbers(text: str) -> list[list[int]]:
    return [[*map(int, line.split())] for line in text.splitlines()]


def floats(text: str) -> list[np.ndarray]:
    """Rows of hexadecimal floats."""
    return [np.array([*map(float.fromhex, line.split())], dtype=np.float32) for line in text.splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    made = ("".join(draw.choice(PIECES) + draw.choice(("", " ")) for _ in range(draw.randint(1, 10))) for _ in range(count))
    return ["", " ", *made]


def copied(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """A copy of a bundle with a changed manifest, not sealed again, which the program does not check."""
    target = folder / "bundle"
    shutil.copytree(bundle, target)
    manifest = json.loads((target / "manifest.json").read_text("utf-8"))
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return target


@pytest.mark.parametrize(
    ("options", "request_"),
    [
        (("--seed", 7), {"seed": 7}),
        (
            ("--seed", -1, "--guidance", 2.5, "--negative", "blurry", "--width", 96, "--height", 64),
            {"seed": -1, "guidance_scale": 2.5, "negative_prompt": "blurry", "width": 96, "height": 64}
            | {"use_resolution_binning": False},
        ),
        (("--seed", 2**64 - 1, "--guidance", 1), {"seed": 2**64 - 1, "guidance_scale": 1.0}),
    ],
    ids=["defaults", "every option", "no guidance"],
)
def test_the_image_is_that_of_the_runtime(
    sana: Any, tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path, options: tuple[object, ...], request_: dict[str, Any]
) -> None:
    done = sana(tiny_bundle, PROMPT, tmp_path / "x.png", *options, "--steps", 3)
    assert f"{tmp_path / 'x.png'}: " in done.stdout
    assert f"seed {request_['seed'] % 2**64}, 3 steps" in done.stdout
    wanted = np.asarray(tiny_runtime(PROMPT, num_inference_steps=3, **request_).images[0]).astype(int)
    assert_same(pixels(tmp_path / "x.png"), wanted)


def test_a_long_prompt_is_cut_as_in_the_runtime(sana: Any, tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    prompt = "A red apple, " * 200
    done = sana(tiny_bundle, prompt, tmp_path / "x.png", "--seed", 3, "--steps", 2)
    assert "the prompt is too long: its last" in done.stderr
    assert_same(pixels(tmp_path / "x.png"), np.asarray(tiny_runtime(prompt, num_inference_steps=2, seed=3).images[0]).astype(int))


def test_files_may_be_links_as_in_the_cache_of_the_hub(sana: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    """The cache has the files in one folder, and a tree of links to them."""
    bundle = copied(tiny_bundle, tmp_path)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate([path for path in bundle.rglob("*") if path.is_file()]):
        file.rename(tmp_path / f"blobs/{number}")
        file.symlink_to(tmp_path / f"blobs/{number}")
    for name, folder in (("linked", bundle), ("plain", tiny_bundle)):
        sana(folder, PROMPT, tmp_path / f"{name}.png", "--seed", 7, "--steps", 1)
    np.testing.assert_array_equal(pixels(tmp_path / "linked.png"), pixels(tmp_path / "plain.png"))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [(), ("int4-weight",)], ids=["fp16", "int4"])
def test_an_fp16_bundle_gives_the_image_of_the_runtime(
    sana: Any, build_cache: Path, tmp_path: Path, quantize: tuple[str, ...]
) -> None:
    """The trained `tiny`; its context goes from one graph to the next in fp16."""
    bundle = exported("tiny", build_cache / "-".join(["tiny-trained-fp16", *quantize]), "fp16", quantize=quantize)
    sana(bundle, PROMPT, tmp_path / "x.png", "--seed", 7)
    with SanaRuntime.from_pretrained(bundle, backend="onnxruntime") as runtime:
        assert_same(pixels(tmp_path / "x.png"), np.asarray(runtime(PROMPT, seed=7).images[0]).astype(int))


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for the order of sums: another number of threads may change the last bit of a float."""
    assert found.shape == wanted.shape
    distance = np.abs(found - wanted)
    assert distance.max() <= 1
    assert (distance == 0).mean() >= 0.99


def test_the_tokens_of_prompts_are_those_of_the_runtime(parts: Any, tiny_bundle: Path) -> None:
    encoder = PromptEncoder.load(tiny_bundle, Manifest.load(tiny_bundle))
    for prompt in ["", "  A Cat ", PROMPT, "一只可爱的猫", "ÀÉ ΟΔΟΣ", "<bos>", "User Prompt: a cat", "very long " * 300]:
        wanted = [
            list(encoder.tokenize(prompt, max_sequence_length=300, instruction=instruction).ids)
            for instruction in (encoder.instruction.text, "")
        ]
        assert whole_numbers(parts("tokens", tiny_bundle, prompt)) == wanted, prompt


@pytest.mark.parametrize("added", [False, True], ids=["as exported", "with more added tokens"])
def test_ids_are_those_of_the_tokenizers_library(parts: Any, tiny_bundle: Path, tmp_path: Path, added: bool) -> None:
    """Gemma's own file has added tokens for runs of line ends and spaces and for HTML tags."""
    path = tiny_bundle / "tokenizer/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    if added:
        plain = [AddedToken(text, normalized=False) for text in ("\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>")]
        tokenizer.add_tokens([*plain, *(AddedToken(text, normalized=True) for text in ("red apple", "  x", "the"))])
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
    prompts = texts(seed=added, count=200)
    assert whole_numbers(parts("encode", path, *prompts)) == [tokenizer.encode(prompt).ids for prompt in prompts]


def test_text_is_lowered_and_stripped_as_python_does(parts: Any) -> None:
    """Every character that Unicode had in 2002; later ones may be missing in one of the two tables."""
    known = unicodedata.ucd_3_2_0
    characters = [chr(code) for code in range(1, sys.maxunicode + 1) if known.category(chr(code)) not in ("Cn", "Cs", "Co")]
    every = "\u2003\x85 " + " ".join(f"x {character}" for character in characters)
    assert parts("lower", text=every).split(" ") == every.lower().strip().split(" ")
    for text in ("ΟΔΟΣ", "Σ", "ΑΣ Β", "ΑΣΒ", "ΑΣ'Β", "ΑΣ.", "ΣΣ", "ΑΣ\u0301", "İSTANBUL", "\x1fx\u3000", "ß ẞ"):
        assert parts("lower", text=text) == text.lower().strip()


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, 2**64 - 1])
def test_noise_has_the_bits_of_the_runtime(parts: Any, seed: int) -> None:
    for count in (16, 17, 31, 512, 5003):
        (found,) = floats(parts("noise", seed, count))
        np.testing.assert_array_equal(found, TorchGenerator(seed).randn((count,)))


@pytest.mark.parametrize(
    "change", [{}, {"solver_type": "heun"}, {"solver_order": 1}, {"flow_shift": 6.0}, {"num_train_timesteps": 500}], ids=str
)
def test_schedules_are_those_of_the_runtime(parts: Any, tiny_bundle: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    bundle = copied(tiny_bundle, tmp_path, lambda manifest: manifest["model"]["scheduler"].update(change))
    scheduler = json.loads((bundle / "manifest.json").read_text("utf-8"))["model"]["scheduler"]
    for steps in (1, 2, 3, 14, 15, 20, 50):
        wanted = make_schedule(scheduler, steps)
        rows = np.concatenate([wanted.timesteps[:, None], wanted.coefficients], axis=1)
        np.testing.assert_array_equal(np.stack(floats(parts("schedule", bundle, steps))), rows)


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces a value in a manifest, or with None removes it."""

    def change(manifest: dict[str, Any]) -> None:
        *parents, last = keys
        for key in parents:
            manifest = manifest[key]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", value=2), f"has the format 2, wanted: {FORMAT}"),
        (_set("format", value=None), f"has the format null, wanted: {FORMAT}"),
        (_set("model", "default_steps", value=10**9), "default_steps is 1000000000, wanted: 1 to 1000"),
        (_set("model", "sample_size", value="4"), 'sample_size is "4", wanted'),
        (_set("model", "embedding_rows", value=7), "do not belong together"),
        (_set("model", "vae_scale_factor", value=16), "decoded image has the wrong type or the shape [1,3,512,512], wanted"),
        (_set("model", "instruction", value="another one"), "the tokenizer gives other token_ids"),
        (_set("model", "scheduler", "_class_name", value="SCMScheduler"), '_class_name is "SCMScheduler", supported'),
        (_set("model", "scheduler", "solver_order", value=3), "solver_order is 3, supported: [1,2]"),
        (_set("model", "scheduler", value=None), "the bundle is damaged: "),
        (_set("model", "guidance_embeds", value=True), "does not support SANA-Sprint checkpoints"),
        (_set("options", "precision", value="bf16"), "cannot run a bundle in bf16 on a CPU. Export it with --dtype fp32 or fp16"),
        (_set("graphs", "sampler", value=None), "the bundle was exported without the graph sampler"),
        (_set("graphs", "sampler", "onnx", "path", value="../bundle/manifest.json"), "names a file outside of the bundle"),
        (_set("graphs", "sampler", "onnx", "path", value="/etc/passwd"), "names a file outside of the bundle"),
        (_set("graphs", "sampler", "onnx", "path", value="C:\\x"), "names a file outside of the bundle"),
        (_set("graphs", "sampler", "onnx", "path", value="onnx"), "onnx is not there"),
        (_set("graphs", "sampler", "onnx", "bytes", value=1), "model.onnx has another size"),
        (_set("files", value=[]), "the manifest does not list tokenizer/tokenizer.json"),
    ],
)
def test_a_bundle_that_it_cannot_draw_with_is_refused(
    sana: Any, tiny_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    done = sana(copied(tiny_bundle, tmp_path, change), PROMPT, tmp_path / "x.png", "--steps", 1, code=4)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert [*tmp_path.glob("x*")] == []


def test_a_damaged_file_is_refused(sana: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copied(tiny_bundle, tmp_path)
    damaged = {
        "embeddings.safetensors": lambda content: b"\xff" * 8 + content[8:],
        "instruction.safetensors": lambda content: content[:50] + b"}" + content[51:],
        "tokenizer/tokenizer.json": lambda content: content[:-20] + b" " * 20,
        "onnx/context/model.onnx": lambda content: bytes(len(content)),
    }
    for name, damage in damaged.items():
        whole = (bundle / name).read_bytes()
        for content, message in ((damage(whole), ""), (whole[:-1], "has another size"), (None, "is not there")):
            (bundle / name).unlink()
            if content is not None:
                (bundle / name).write_bytes(content)
            done = sana(bundle, PROMPT, tmp_path / "x.png", "--steps", 1, code=4)
            assert message in done.stderr
            (bundle / name).write_bytes(whole)
    (bundle / "manifest.json").write_text("<html>", "utf-8")
    assert "manifest.json is damaged" in sana(bundle, PROMPT, tmp_path / "x.png", code=4).stderr
    assert "manifest.json is not there" in sana(tmp_path / "nothing", PROMPT, tmp_path / "x.png", code=4).stderr


def test_a_sprint_bundle_is_refused(sana: Any, sprint_bundle: Path, tmp_path: Path) -> None:
    assert "does not support SANA-Sprint" in sana(sprint_bundle, PROMPT, tmp_path / "x.png", code=4).stderr


def test_a_bundle_with_a_controlnet_is_refused(sana: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    extra = {"name": "residuals", "dtype": "float32", "shape": [1]}
    change = lambda manifest: manifest["graphs"]["denoiser"]["spec"]["inputs"].append(extra)  # noqa: E731
    done = sana(copied(tiny_bundle, tmp_path, change), PROMPT, tmp_path / "x.png", code=4)
    assert "does not support the bundle's graph denoiser: it has the input residuals" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: sana BUNDLE PROMPT"),
        (("x.jpg",), "unsupported image format"),
        (("x.png", "--steps"), "--steps needs a value"),
        (("x.png", "--steps", "0"), "--steps is 0, wanted: 1 to 1000"),
        (("x.png", "--steps", "2x"), "--steps is not a number: 2x"),
        (("x.png", "--seed", str(2**64)), "--seed is out of range: 18446744073709551616"),
        (("x.png", "--guidance", "nan"), "--guidance is not a number: nan"),
        (("x.png", "--width", "65"), "width and height must be multiples of 32, found: 65x"),
        (("x.png", "--size", "64"), "unknown option --size"),
    ],
)
def test_bad_arguments_are_refused(sana: Any, tiny_bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in sana(tiny_bundle, PROMPT, *arguments, code=2).stderr


def test_an_image_that_cannot_be_written(sana: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    done = sana(tiny_bundle, PROMPT, tmp_path / "nowhere/x.png", "--steps", 1, code=3)
    assert "x.png cannot be written" in done.stderr


def test_a_prompt_that_is_not_utf8_is_refused(program: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for prompt in (b"caf\xe9", b"\xc0\x80", b"\xed\xa0\x80x", b"\x80"):
        done = subprocess.run([program, tiny_bundle, prompt, tmp_path / "x.png"], capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (2, b"error: the prompt is not UTF-8\n")


def test_the_readme_counts_the_lines_of_every_file() -> None:
    folder = ROOT / "examples/cpp"
    readme = (folder / "README.md").read_text("utf-8")
    for path in [*folder.glob("*.cpp"), *folder.glob("*.h")]:
        assert f"| `{path.name}` | {len(path.read_text('utf-8').splitlines())} |" in readme
    assert f"kFormat = {FORMAT};" in (folder / "bundle.h").read_text("utf-8")
