"""examples/javascript: its parts in node against the runtime's, and the page in a browser against the runtime's images."""

from __future__ import annotations

import base64
import copy
import hashlib
import http.client
import io
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from sana_export.architectures import SCHEDULER_DEFAULTS
from sana_export.formats.safetensors_file import TensorFile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.noise import TorchGenerator
from sana_export.runtime.schedule import make_schedule
from sana_export.supported import SCHEDULERS
from tests.support.bundles import exported

LOG = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "javascript"
SUPPORT = ROOT / "tests" / "support"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SERIES = {"DPMSolverMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift", "SCMScheduler": "sigma_data"}
#: What makes diffusers' defaults a scheduler that Sana can have.
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def node() -> str:
    if (found := shutil.which("node")) is None:
        pytest.skip("node is not installed (apt-get install nodejs)")
    return found


def run_module(script: str, **task: Any) -> Any:
    """The result of a script of tests/support for a task."""
    given = json.dumps({"example": str(EXAMPLE), **task})
    done = subprocess.run([node(), SUPPORT / script], input=given, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_node(name: str, **task: Any) -> Any:
    return run_module("javascript.mjs", name=name, **task)


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of the example's server with a bundle."""
    arguments = [node(), EXAMPLE / "serve.js", bundle, "0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def test_noise_is_torchs() -> None:
    """Any number of values: fewer than 16 with the one that is kept, multiples of 16, and a tail that is drawn again."""
    seeds, sizes = [0, 42, -5, 2**32 + 7, -(2**63), 2**64 - 1], [512, 1, 17, 3, 1, 1000, 5, 16, 2]
    outside = [2**64, -(2**63) - 1]
    *drawn, first, second = in_node("noise", seeds=[*map(str, seeds + outside)], sizes=sizes)
    for seed, found in zip(seeds, drawn, strict=True):
        generator = TorchGenerator(seed)
        for size, values in zip(sizes, found, strict=True):
            np.testing.assert_allclose(np.array(values, np.float32), generator.randn((size,)), rtol=0, atol=1e-6)
    assert first == second == {"refused": "The seed must be from -2**63 to 2**64 - 1."}


def config(name: str, **changes: Any) -> dict[str, Any]:
    flow = {key: value for key, value in FLOW.items() if key in SCHEDULER_DEFAULTS[name] and name != "SCMScheduler"}
    return {**SCHEDULER_DEFAULTS[name], "_class_name": name, **flow, **changes}


def schedules(requests: list[tuple[dict[str, Any], int]]) -> Any:
    finite = [({key: value for key, value in config.items() if value != -math.inf}, steps) for config, steps in requests]
    return in_node("schedules", requests=finite)


def check_schedule(found: Any, config: dict[str, Any], steps: int) -> None:
    wanted = make_schedule(config, steps)
    np.testing.assert_array_equal(np.array(found["rows"], np.float32), wanted.coefficients)
    np.testing.assert_array_equal(np.array(found["timesteps"], np.float32), wanted.timesteps)
    assert (found["noiseScale"], found["noisy"]) == (wanted.initial_noise_scale, wanted.needs_noise)


def test_schedules_are_the_runtimes() -> None:
    requests = [
        (config(name, **{series: value}, **others), steps)
        for name, series in SERIES.items()
        for value in ((0.5, 0.7) if name == "SCMScheduler" else (1.0, 3.0, 6.0))
        for others in (
            [{"solver_order": order, "solver_type": kind} for order in (1, 2) for kind in ("midpoint", "heun")]
            if name == "DPMSolverMultistepScheduler"
            else [{}]
        )
        for steps in (1, 2, 3, 14, 15, 20, 50)
    ]
    for found, (settings, steps) in zip(schedules(requests), requests, strict=True):
        check_schedule(found, settings, steps)


def test_every_other_scheduler_and_setting_is_the_runtimes_or_refused_by_name() -> None:
    changes: dict[str, list[Any]] = {
        "algorithm_type": ["sde-dpmsolver++", "dpmsolver"],
        "solver_order": [3, 4],
        "solver_type": ["bh1", "logrho"],
        "final_sigmas_type": ["sigma_min"],
        "prediction_type": ["epsilon", "v_prediction"],
        "use_flow_sigmas": [False],
        "thresholding": [True],
        "shift_terminal": [0.1],
        "stochastic_sampling": [True],
        "invert_sigmas": [True],
        "use_dynamic_shifting": [True],
        "lower_order_final": [False],
        "euler_at_final": [True],
        "num_train_timesteps": [500],
        **{f"use_{kind}": [True] for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")},
    }
    cases = [
        (name, key, config(name, **{key: value}))
        for name in SCHEDULERS
        for key, values in {"": [0], **changes}.items()
        if not key or key in SCHEDULER_DEFAULTS[name]
        for value in values
    ]
    refused = []
    for found, (name, key, settings) in zip(schedules([(case[2], 8) for case in cases]), cases, strict=True):
        if "refused" not in found:
            check_schedule(found, settings, 8)
            continue
        assert name in found["refused"]
        assert name not in SERIES or key in found["refused"]
        refused.append((name, key))
    assert len(set(refused)) > 40
    third = schedules([(config("DPMSolverMultistepScheduler", solver_order=3), 8)])[0]["refused"]
    assert third == "This page does not know DPMSolverMultistepScheduler with solver_order = 3. It knows 1 or 2."
    assert not {(name, "") for name in SERIES} & set(refused)


def sealed(document: dict[str, Any]) -> str:
    """The text of a manifest, as docs/bundle.md seals it."""
    document.pop("sha256", None)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(
        {**document, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1, sort_keys=True, ensure_ascii=False
    )


def test_manifests_are_read_with_their_seal(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text("utf-8")
    document = json.loads(text)
    odd = {
        "numbers": [1, 1.0, -0.0, 1e-7, 1e16, 2**53, math.inf, -math.inf, math.nan, True, None],
        "日本 ü": '"\\\n\u0001\u007f/🐼 -1.5',
    }
    with_parity = sealed({**document, "parity": odd})
    other = {key: value for key, value in document.items() if key != "sha256"}
    changes: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("format 2 of sana-export 0.1.0; this page reads format 3", lambda m: m.update(format=2)),
        ("sana-export 0.2.0", lambda m: m.update(tool_version="0.2.0")),
        ("--dtype fp16 or fp32", lambda m: m["options"].update(precision="bf16")),
        *[
            (f"outside the bundle: {path}", lambda m, path=path: m["graphs"]["context"]["onnx"].update(path=path))
            for path in ("../x", "/x", "a//b", "c:/x", "https://x.test/y", "a\\b", "")
        ],
    ]
    documents = []
    for _, change in changes:
        documents.append(copy.deepcopy(other))
        change(documents[-1])
    texts = [text, with_parity, text.replace('"default_steps": 20', '"default_steps": 21'), "<html>", "{}", *map(sealed, documents)]
    whole, parity, edited, page, empty, *refused = in_node("manifests", texts=texts)
    infinite = {
        key: str(value).replace("inf", "Infinity") for key, value in other["model"]["scheduler"].items() if value == -math.inf
    }
    assert infinite
    wanted = copy.deepcopy(other)
    wanted["model"]["scheduler"].update(infinite)
    assert whole == wanted
    assert parity["parity"]["numbers"] == [1, 1, 0, 1e-7, 1e16, 2**53, "Infinity", "-Infinity", "NaN", True, None]
    assert parity["parity"]["日本 ü"] == odd["日本 ü"]
    assert edited["refused"].startswith("manifest.json was changed after it was written: its seal is wrong.")
    assert page["refused"].startswith("manifest.json is damaged: ")
    assert empty["refused"].startswith("The bundle has format undefined ")
    for found, (message, _) in zip(refused, changes, strict=True):
        assert message in found["refused"]


def test_prompts_are_stripped_and_lowercased_as_in_python() -> None:
    known = [chr(code) for code in range(0x3100) if unicodedata.category(chr(code)) != "Cn"]  # node may know newer letters
    texts = [f"{character}A{character}b{character}" for character in known]
    texts += ["ÀΣ ΑΣ İ ẞ ǅ ЖЩ", "\ufeff x \ufeff", "\r\n Two\nLines \t", "", " \u3000 ", "🐼 Ｆｕｌｌ "]
    assert in_node("normalized", texts=texts) == [text.lower().strip() for text in texts]


@pytest.mark.parametrize("most_hashed", [1 << 26, 0], ids=["whole", "ranges"])
def test_rows_of_the_embedding_table_are_read_whole_or_in_ranges(tiny_bundle: Path, most_hashed: int) -> None:
    table = TensorFile(tiny_bundle / "embeddings.safetensors")["embed_tokens.weight"].read()
    channels = table.shape[1]
    ids = [0, 2, 777, len(table) - 1]
    parts = [[index * channels, channels] for index in ids]
    with served(tiny_bundle) as url:
        task = {"url": f"{url}bundle/", "path": "embeddings.safetensors", "parts": parts, "mostHashed": most_hashed}
        found, missing = in_node("tensors", names=["embed_tokens.weight", "nothing"], **task)
    assert found["shape"] == list(table.shape)
    np.testing.assert_array_equal(np.array(found["values"], np.float32), table[ids])
    assert missing == {"refused": "The bundle's text files have no nothing that this page can read."}


def test_tensors_of_every_dtype(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    bits = np.array([0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0xC4D2, 0x7BFF, 0xFBFF], np.uint16)
    stored = {
        "half": ("F16", bits.tobytes(), bits.view(np.float16).astype(np.float64)),
        "brain": ("BF16", bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)),
        "single": ("F32", np.float32([0.1, -3e38, 7]).tobytes(), np.float32([0.1, -3e38, 7]).astype(np.float64)),
        "ids": ("I64", np.int64([0, 255_999, -1]).tobytes(), np.array([0, 255_999, -1])),
    }
    header, data = {}, b""
    for name, (dtype, raw, values) in stored.items():
        header[name] = {"dtype": dtype, "shape": [len(values)], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + data
    (bundle / "x.safetensors").write_bytes(file)
    manifest = json.loads((tiny_bundle / "manifest.json").read_text("utf-8"))
    manifest["files"] = [{"path": "x.safetensors", "bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()}]
    (bundle / "manifest.json").write_text(sealed(manifest), "utf-8")
    with served(bundle) as url:

        def read(most_hashed: int) -> Any:
            task = {"url": url + "bundle", "path": "x.safetensors", "parts": [[], [1, 2]], "mostHashed": most_hashed}
            return in_node("tensors", names=list(stored), **task)

        for found in (read(1 << 26), read(0)):
            for (_, _, values), tensor in zip(stored.values(), found, strict=True):
                np.testing.assert_array_equal(tensor["values"][0], values)
                np.testing.assert_array_equal(tensor["values"][1], values[1:3])
        (bundle / "x.safetensors").write_bytes(file[:-1] + b"?")
        assert read(1 << 26)[0]["refused"].startswith("x.safetensors is damaged: its SHA-256 is not the one in the manifest.")
        (bundle / "x.safetensors").write_bytes(file[:-1])
        assert read(1 << 26)[0]["refused"].startswith("x.safetensors is damaged: it has ")
        assert "another size than in the manifest" in read(0)[0]["refused"]
        (bundle / "x.safetensors").unlink()
        assert read(0)[0]["refused"].startswith("The bundle has no x.safetensors: ")
    assert "cannot be reached" in read(0)[0]["refused"]


def test_the_server_serves_the_page_the_bundle_and_nothing_else(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = (tiny_bundle / "manifest.json").read_bytes()
    with served(tiny_bundle) as url:
        client = http.client.HTTPConnection(url.removeprefix("http://").strip("/"), timeout=60)

        def get(path: str, ranged: str | None = None, method: str = "GET") -> tuple[int, str | None, bytes]:
            client.request(method, path, headers={} if ranged is None else {"Range": ranged})
            response = client.getresponse()
            return response.status, response.getheader("Content-Range"), response.read()

        assert get("/")[2] == (EXAMPLE / "index.html").read_bytes()
        assert get("/bundle/manifest.json") == (200, None, manifest)
        size = len(manifest)
        assert get("/bundle/manifest.json", "bytes=3-9") == (206, f"bytes 3-9/{size}", manifest[3:10])
        assert get("/bundle/manifest.json", f"bytes={size - 2}-{size + 5}")[1:] == (
            f"bytes {size - 2}-{size - 1}/{size}",
            manifest[-2:],
        )
        assert get("/bundle/manifest.json", f"bytes={size}-")[:2] == (416, f"bytes */{size}")
        assert get("/bundle/manifest.json", method="HEAD") == (200, None, b"")
        secret = (tmp_path / "secret").as_posix()
        (tmp_path / "secret").write_text("x")
        inside = ("/", "/bundle/", "/bundle/../", "/%2e%2e/", "/..%2f", "/..%5c", "/bundle/..%2f..%2f")
        outside = [f"{start}{path}" for start in inside for path in ("LICENSE", secret, secret[1:])]
        outside += ["/..%2f..%2fLICENSE", "/%2e%2e/%2e%2e/LICENSE", f"/%2f{secret}", "/%", "//", "/bundle/", "/x", "/%00", "*"]
        assert [path for path in outside if get(path)[0] != 404] == []
    done = subprocess.run([node(), EXAMPLE / "serve.js", tmp_path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        f"{tmp_path} is not a bundle: it has no manifest.json. Make one: sana-export export tiny -o {tmp_path}\n",
    )


def test_the_npm_packages_have_pinned_versions() -> None:
    package = json.loads((EXAMPLE / "package.json").read_text("utf-8"))
    versions = [*package["dependencies"].values(), *package["devDependencies"].values()]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions)
    assert [path.name for path in EXAMPLE.glob("*lock*")] == []


# From here on: with the npm packages (`make test-browser`).


@pytest.fixture(scope="session")
def packages() -> None:
    node()
    if not (EXAMPLE / "node_modules").exists():
        pytest.skip("the npm packages are not installed (make test-browser)")


@pytest.fixture(scope="session")
def browser(packages: None) -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"no browser: install one of {', '.join(BROWSERS)}")
    if found is None:
        pytest.skip("no browser is installed (apt-get install chromium)")
    return found


@pytest.fixture(scope="session", params=["fp32", "fp16", "fp16-int4-weight"])
def drawing_bundle(request: pytest.FixtureRequest, build_cache: Path) -> Path:
    """A bundle of `tiny`, which draws."""
    precision, _, scheme = request.param.partition("-")
    return exported("tiny", build_cache / f"tiny-trained-{request.param}", precision, quantize=(scheme,) if scheme else ())


@pytest.fixture(scope="session")
def fp32_bundle(build_cache: Path) -> Path:
    return exported("tiny", build_cache / "tiny-trained-fp32")


def on_page(browser: str, bundle: Path, *draws: dict[str, Any], query: str = "", **task: Any) -> Any:
    """What the page shows after each of `draws`, whose keys are names of the form's fields."""
    fields = [{name: str(value) for name, value in draw.items()} for draw in draws]
    with served(bundle) as url:
        found = run_module("browser.mjs", browser=browser, url=url + query, draws=fields, **task)
    assert all(request.startswith((url, "data:", "blob:")) for request in found["requests"])
    for image in found["images"]:
        with Image.open(io.BytesIO(base64.b64decode(image["png"]))) as opened:
            image["pixels"] = np.asarray(opened.convert("RGB"))
    return found


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    error = np.square(found.astype(np.float64) - wanted).mean()
    return 10 * math.log10(255**2 / error) if error else 99.0


def check_images(browser: str, bundle: Path, draws: list[dict[str, Any]], least: float) -> None:
    found = on_page(browser, bundle, *draws)
    assert found["error"] is None
    with SanaRuntime.from_pretrained(bundle, backend="onnxruntime", threads=1) as runtime:
        for draw, image in zip(draws, found["images"], strict=True):
            names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negativePrompt": "negative_prompt"}
            wanted = runtime(**{names.get(name, name): value for name, value in draw.items()}).images[0]
            close = psnr(image["pixels"], np.asarray(wanted))
            LOG.info("%s, %s: %.1f dB, %s", bundle.name, draw, close, image["times"])
            assert list(image["times"]) == ["text encoder", "denoiser", "decoder", "total"]
            assert close > least


@pytest.mark.slow
def test_tokens_are_pythons(packages: None, fp32_bundle: Path) -> None:
    file = fp32_bundle / "tokenizer" / "tokenizer.json"
    instruction = json.loads((fp32_bundle / "manifest.json").read_text("utf-8"))["model"]["instruction"]
    texts = [
        "",
        "a red apple",
        "🐼",
        "👩‍👩‍👧‍👦 🇩🇪 ❤️",
        "一只熊猫在吃竹子",
        "  two   spaces",
        "line\nbreak\r\n\ttab",
        "<bos> <pad> a<eos>b",
        "<0x0A>",
    ]
    texts += ["▁x▁", "\u3000全角", "e\u0301 é ǆ", "x" * 300, "\x00a\u200b\u00a0", "مرحبا", "𝔘𝔫𝔦", "the " * 500]
    some = random.Random(0)
    for _ in range(500):
        ranges = [(32, 127), (32, 0x2FFF), (0x4E00, 0x9FFF), (0x1F300, 0x1FA00)]
        texts.append("".join(chr(some.randrange(*some.choice(ranges))) for _ in range(some.randrange(30))))
    texts += [instruction + text for text in texts[:60]]
    tokenizer = Tokenizer.from_file(str(file))
    assert in_node("tokens", file=str(file), texts=texts) == [tokenizer.encode(text).ids for text in texts]


@pytest.mark.slow
def test_the_page_draws_the_runtimes_images(browser: str, drawing_bundle: Path) -> None:
    draws = [
        {"prompt": "a red apple", "steps": 20, "guidance": 4.5, "seed": 42},
        {"prompt": "  A cute 🐼 ", "negativePrompt": "Blue", "steps": 8, "guidance": 3, "seed": 7},
        {"prompt": "一只熊猫", "negativePrompt": "", "steps": 12, "guidance": 1, "seed": 2**63 + 5},
        {"prompt": "a dog " * 200, "steps": 3, "guidance": 4.5, "seed": -3},
    ]
    check_images(browser, drawing_bundle, draws, 70 if "fp32" in drawing_bundle.name else 45)


@pytest.mark.slow
def test_the_page_draws_sprint(browser: str, sprint_bundle: Path) -> None:
    draws = [{"prompt": "a red apple", "steps": steps, "guidance": guidance, "seed": 5} for steps, guidance in ((2, 4.5), (4, 2))]
    check_images(browser, sprint_bundle, draws, 70)


@pytest.mark.slow
def test_the_page_fits_a_phone_and_says_that_a_prompt_is_too_long(browser: str, fp32_bundle: Path, tmp_path: Path) -> None:
    shot = tmp_path / "phone.png"
    draw = {"prompt": "the " * 400, "steps": 2}
    found = on_page(browser, fp32_bundle, draw, viewport={"width": 360, "height": 740}, screenshot=str(shot))
    assert (found["error"], found["overflow"]) == (None, 0)
    assert re.fullmatch(r"Done. The prompt is too long by \d+ tokens: its end was left out.", found["images"][0]["status"])
    assert found["images"][0]["pixels"].std() > 10


@pytest.mark.slow
def test_the_page_says_what_is_wrong(browser: str, fp32_bundle: Path, controlnet_bundle: Path) -> None:
    text = (fp32_bundle / "manifest.json").read_text("utf-8")
    document = json.loads(text)
    weights = bytearray((fp32_bundle / "onnx/context/model.onnx.data").read_bytes())
    weights[-1] ^= 1
    unknown = copy.deepcopy(document)
    unknown["model"]["scheduler"]["_class_name"] = "UniPCMultistepScheduler"
    cases = {
        "The bundle has no manifest.json: ": {"**/bundle/manifest.json": None},
        "The bundle has no onnx/sampler/model.onnx: ": {"**/sampler/model.onnx": None},
        "onnx/context/model.onnx.data is damaged: its SHA-256": {"**/context/model.onnx.data": bytes(weights)},
        "onnx/context/model.onnx.data is damaged: it has 3 bytes": {"**/context/model.onnx.data": b"..."},
        "The bundle has format 2 ": {"**/bundle/manifest.json": sealed({**document, "format": 2}).encode()},
        "manifest.json was changed": {"**/bundle/manifest.json": text.replace('"fp32"', '"fp16"', 1).encode()},
        "This page does not know the scheduler UniPC": {"**/bundle/manifest.json": sealed(unknown).encode()},
        "The npm packages are missing": {"**/node_modules/**": None},
    }
    for message, replaced in cases.items():
        encoded = {path: None if body is None else base64.b64encode(body).decode() for path, body in replaced.items()}
        found = on_page(browser, fp32_bundle, {"prompt": "x"}, replaced=encoded)
        assert found["error"].startswith(message)
        assert (found["images"], found["status"]) == ([], "")
    assert on_page(browser, controlnet_bundle)["error"].startswith("This page cannot draw with a bundle that has a ControlNet.")
    found = on_page(browser, fp32_bundle, {"prompt": "x", "seed": 2**64})
    assert found["error"] == "The seed must be from -2**63 to 2**64 - 1."
