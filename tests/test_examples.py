"""Every program in `examples/`, run as a user runs it, makes what `SanaRuntime` makes with the same request."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import http.client
import io
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from sana_export import Request, SanaRuntime
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from tests.support.lora_files import diffusers_lora, load_transformer

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
PROMPT = "A cute 🐼"
#: More than a test waits for.
ENDLESS = 1000


def command(program: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / program), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def run(program: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, as a user does."""
    done = subprocess.run(
        command(program, *arguments), env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == code, done.stderr
    return done


def run_here(program: str, *arguments: object) -> list[str]:
    """Run a program in this process, where its libraries are loaded already, and return the lines that it prints."""
    path, printed, interrupts = ROOT / "examples" / program, io.StringIO(), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
    signal.signal(signal.SIGINT, interrupts)
    return printed.getvalue().splitlines()


def definitions(name: str) -> dict[str, Any]:
    """What a program defines, without running it."""
    return runpy.run_path(str(ROOT / "examples" / name))


def pixels(image: Any) -> np.ndarray:
    """The values of an image, or of the image in a file or in bytes."""
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def drawn(runtime: SanaRuntime, prompt: Any = PROMPT, **options: Any) -> list[np.ndarray]:
    return [pixels(image) for image in runtime(prompt, **{"num_inference_steps": 2, **options}).images]


def test_generate(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    output = tmp_path / "panda.png"
    done = run("generate.py", tiny_bundle, PROMPT, "-o", output, "--seed", 5, "--steps", 2, "--height", 64, "--width", 96)
    np.testing.assert_array_equal(pixels(output), drawn(tiny_runtime, seed=5, height=64, width=96)[0])
    assert f"{output}: 96x64, seed 5\n" in done.stdout
    seconds = dict(re.findall(r"^(\w[\w ]*\w) +(\d+\.\d+) s$", done.stdout, re.MULTILINE))
    assert list(seconds) == ["text encoder", "denoising", "decoder", "total"]
    assert 0 < float(seconds["denoising"]) < float(seconds["total"])


def test_generate_prints_the_seed_that_it_drew(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    lines = run_here("generate.py", tiny_bundle, PROMPT, "-o", tmp_path / "x.png", "--steps", 2)
    seed = int(re.findall(r"seed (\d+)", lines[0])[0])
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), drawn(tiny_runtime, seed=seed)[0])


def test_generate_shows_an_error_without_a_traceback(tmp_path: Path) -> None:
    done = run("generate.py", tmp_path / "nothing", PROMPT, code=1)
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr


def test_batch(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    prompts = ["a red apple", "a green pear"]
    lines = run_here("batch.py", tiny_bundle, *prompts, "--images", 2, "--seed", 7, "--steps", 2, "-o", tmp_path / "fruit")
    files = sorted((tmp_path / "fruit").iterdir())
    assert [file.name for file in files] == [f"{index:03d}-seed-{7 + index}.png" for index in range(4)]
    assert lines == [f"{file}: seed {7 + index}, {prompts[index // 2]}" for index, file in enumerate(files)]
    together = drawn(tiny_runtime, prompts, num_images_per_prompt=2, seed=[7, 8, 9, 10])
    for file, wanted in zip(files, together, strict=True):
        np.testing.assert_array_equal(pixels(file), wanted)
    # Alone with its seed, an image differs by the order of float32 sums at most.
    alone = drawn(tiny_runtime, prompts[1], seed=10)[0]
    assert np.abs(pixels(files[3]).astype(int) - alone).max() <= 1
    assert np.abs(together[0].astype(int) - alone).mean() > 1


def test_preview(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    output = tmp_path / "apple.png"
    lines = run_here("preview.py", tiny_bundle, PROMPT, "-o", output, "--seed", 3, "--steps", 3)
    request = Request(PROMPT, num_inference_steps=3, seed=3)
    plan = tiny_runtime.plan(request)
    steps = list(tiny_runtime.steps(plan, tiny_runtime.encode(plan)))
    assert lines == [f"step {step.index}, timestep {step.timestep:.1f}" for step in steps]
    np.testing.assert_array_equal(pixels(output), drawn(tiny_runtime, seed=3, num_inference_steps=3)[0])
    assert len(list(tmp_path.iterdir())) == 4
    for step in steps:
        wanted = tiny_runtime.preview(step.x0)[0]
        assert wanted.size == (16, 16)
        np.testing.assert_array_equal(pixels(tmp_path / f"apple-{step.index:02d}.png"), pixels(wanted))
    run_here("preview.py", tiny_bundle, PROMPT, "-o", output, "--seed", 3, "--steps", 1, "--whole")
    np.testing.assert_array_equal(pixels(tmp_path / "apple-00.png"), pixels(output))


def test_blend(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    prompts = ("a red apple", "a very long green pear on a small table")
    lines = run_here("blend.py", tiny_bundle, *prompts, "--images", 3, "--seed", 7, "--steps", 2, "-o", tmp_path / "blend")
    files = sorted((tmp_path / "blend").iterdir())
    assert lines == [f"{file}: {share} of the second prompt" for file, share in zip(files, ("0%", "50%", "100%"), strict=True)]
    first, middle, last = map(pixels, files)
    np.testing.assert_array_equal(first, drawn(tiny_runtime, prompts[0], seed=7)[0])
    np.testing.assert_array_equal(last, drawn(tiny_runtime, prompts[1], seed=7)[0])
    assert min(np.abs(middle.astype(int) - other).mean() for other in (first, last)) > 1


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to every process of a console")
def test_preview_is_cancelled_by_ctrl_c(tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "apple.png"
    arguments = command("preview.py", tiny_bundle, PROMPT, "-o", output, "--steps", ENDLESS)
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("step 0,")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (1, "cancelled\n")
    assert (tmp_path / "apple-00.png").is_file()
    assert not output.exists()


def test_lora(tiny_bundle: Path, tiny_checkpoint: Any, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    lora = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=4, lora_alpha=7)
    lines = run_here("lora.py", tiny_bundle, lora, PROMPT, "--scale", 0.7, "--seed", 7, "--steps", 2, "-o", tmp_path)
    plain = drawn(tiny_runtime, seed=7)[0]
    np.testing.assert_array_equal(pixels(tmp_path / "plain.png"), plain)
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime") as runtime:
        runtime.load_lora(lora, 0.7)
        np.testing.assert_array_equal(pixels(tmp_path / "with-lora.png"), drawn(runtime, seed=7)[0])
    assert np.abs(pixels(tmp_path / "with-lora.png").astype(int) - plain).mean() > 5
    assert lines == [
        f"{tmp_path / 'with-lora.png'}: LoRAs ['style']",
        f"{tmp_path / 'plain.png'}: LoRAs []",
    ]


def test_own_backend(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    lines = run_here("own_backend.py", tiny_bundle, PROMPT, tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), drawn(tiny_runtime, seed=42, num_inference_steps=None)[0])
    graphs = [found[1] for line in lines if (found := re.fullmatch(r"(\w+) +\d+\.\d ms", line))]
    steps = tiny_runtime.manifest.model.default_steps
    assert (graphs.count("denoiser"), graphs.count("sampler"), graphs.count("vae_decoder")) == (steps, steps, 1)


def test_diffusers_pipeline(tiny_bundle: Path, tiny_checkpoint: Any, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    words = ("--seed", 5, "--steps", 2, "--size", 96)
    lines = run_here("diffusers_pipeline.py", tiny_bundle, tiny_checkpoint.folder, PROMPT, "-o", tmp_path / "pandas", *words)
    times = [found[1] for line in lines if (found := re.fullmatch(r"(\S+) +\d+\.\d\d s", line))]
    assert times == ["diffusers", "use_bundle", "bundle-alone"]
    wanted = drawn(tiny_runtime, seed=5, height=96, width=96, use_resolution_binning=False)[0]
    for name in ("diffusers", "use_bundle", "bundle-alone"):
        difference = np.abs(pixels(tmp_path / "pandas" / f"{name}.png").astype(int) - wanted)
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999, name


class Server:
    """A running web_handler.py."""

    def __init__(self, address: str) -> None:
        host, port = re.fullmatch(r"http://([\d.]+):(\d+)/", address.strip()).groups()  # type: ignore[union-attr]
        self.address = (host, int(port))

    def get(self, target: str | None = None, **query: object) -> tuple[int, str | None, bytes]:
        """Status, content type and body of the answer."""
        client = http.client.HTTPConnection(*self.address, timeout=60)
        client.request("GET", f"/?{urlencode({'prompt': PROMPT, 'steps': 2, **query})}" if target is None else target)
        response = client.getresponse()
        return response.status, response.getheader("Content-Type"), response.read()

    def send(self, **query: object) -> socket.socket:
        """A request whose answer nobody has read yet."""
        client = socket.create_connection(self.address, timeout=60)
        client.sendall(f"GET /?{urlencode({'prompt': PROMPT, **query})} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        return client

    def get_until(self, status: int, **query: object) -> bytes:
        """The body of the first answer with this status."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found, _, body = self.get(**query)
            if found == status:
                return body
            time.sleep(0.05)
        pytest.fail(f"no answer had the status {status}")


@contextmanager
def serving(bundle: Path, *options: object) -> Iterator[Server]:
    arguments = command("web_handler.py", bundle, "--port", 0, *options)
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(process.stdout.readline())
            if os.name != "nt":
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=60) == ("", "")
                assert process.returncode == 0
        finally:
            process.kill()


def test_web_handler_answers_concurrent_requests(tiny_bundle: Path, tiny_runtime: SanaRuntime) -> None:
    with serving(tiny_bundle, "--places", 2) as server, ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda seed: server.get(seed=seed), (1, 2)))
        assert [answer[:2] for answer in answers] == [(200, "image/png")] * 2
        for seed, (_, _, body) in zip((1, 2), answers, strict=True):
            np.testing.assert_array_equal(pixels(body), drawn(tiny_runtime, seed=seed)[0])
        assert not np.array_equal(pixels(answers[0][2]), pixels(answers[1][2]))
        assert server.get("/favicon.ico")[0] == 400
        assert server.get(steps="many")[0] == 400
        assert server.get(steps=51) == (400, "text/plain; charset=utf-8", b"at most 50 steps")
        wrong_seed = b"the seed is out of range\nwanted: an integer from -2**63 to 2**64 - 1"
        assert server.get(seed=-(2**80)) == (400, "text/plain; charset=utf-8", wrong_seed)


def test_web_handler_refuses_when_all_places_are_taken_and_frees_those_of_clients_that_left(
    tiny_bundle: Path, tiny_runtime: SanaRuntime
) -> None:
    with serving(tiny_bundle, "--places", 2, "--max-steps", ENDLESS, "--timeout", 600) as server:
        first, second = server.send(steps=ENDLESS), server.send(steps=ENDLESS)
        assert server.get_until(503, seed=3) == b"all places are taken"
        assert server.get(seed=3)[0] == 503
        first.close()  # this one draws
        second.close()  # this one waits for its turn
        np.testing.assert_array_equal(pixels(server.get_until(200, seed=3)), drawn(tiny_runtime, seed=3)[0])


def test_web_handler_gives_up_after_the_timeout(tiny_bundle: Path, tiny_runtime: SanaRuntime) -> None:
    with serving(tiny_bundle, "--places", 1, "--max-steps", ENDLESS, "--timeout", 3) as server:
        started = time.monotonic()
        assert server.get(steps=ENDLESS)[0] == 504
        assert 3 <= time.monotonic() - started < 20
        np.testing.assert_array_equal(pixels(server.get_until(200, seed=4)), drawn(tiny_runtime, seed=4)[0])


def test_web_handler_stops_with_a_request_under_way(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--places", 1, "--max-steps", ENDLESS) as server, server.send(steps=ENDLESS):
        server.get_until(503)


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (UsageError("too wide", found="/srv/b", wanted="1 to 8", fix="--width 8"), 400, b"too wide\nwanted: 1 to 8"),
        (UsageError("too wide", found="/srv/b", fix="--width 8"), 400, b"too wide"),
        (DependencyError("out of memory in /srv/b", fix="--memory staged"), 503, b"this machine cannot draw the image now"),
        (ArtifactError("/srv/b is damaged", fix="sana-export export x -o /srv/b"), 500, b"drawing failed"),
    ],
)
def test_web_handler_answers_an_error_with_its_status_and_logs_what_the_client_does_not_see(
    error: SanaExportError, status: int, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    async def answer() -> tuple[int, bytes]:
        service = definitions("web_handler.py")["ImageService"](failing, places=1, timeout=60, max_steps=2)
        return await service.answer("GET /?prompt=x HTTP/1.1", asyncio.StreamReader())

    assert asyncio.run(answer()) == (status, body)
    assert caplog.messages == ([] if isinstance(error, UsageError) else [str(error)])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_program_says_how_to_run_it_and_is_in_the_table(program: Path) -> None:
    described = ast.get_docstring(ast.parse(program.read_text("utf-8"))) or ""
    assert f"\npython examples/{program.name} engines/out/tiny" in described
    assert f"[{program.name}]({program.name})" in (ROOT / "examples/README.md").read_text("utf-8")
    assert f"test_{program.stem}" in Path(__file__).read_text("utf-8")
