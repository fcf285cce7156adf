"""The application on a real Ray on this machine: images, errors, request ids, and the death of a replica."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("ray")

from tests.support.serving import wait_for

pytestmark = pytest.mark.slow

BODY = {"prompt": "a red apple", "seed": 5, "num_inference_steps": 4, "n": 2}
CONFIG = {
    "replicas": 1,
    "front_replicas": 1,
    "gpus_per_replica": 0,
    "cpus_per_replica": 0,
    "cpus_per_front": 0,
    "threads": 1,
    "max_batch": 1,
    "max_ongoing_requests": 1,
    "max_queued_requests": 2,
    "health_size": 64,
    "health_image_period": 1,
    "health_check_period": 1,
    "allow_without_keys": True,
    "timeout": 240,
    "limits": {"steps": 500},
}


@pytest.fixture(scope="module")
def client(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of the application with one replica of each kind, which draws with `tiny-random`."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "sana_export.serve.ray.proxy.middlewares",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import ray
        from ray import serve

        from sana_export.serve.ray.config import RayConfig
        from sana_export.serve.ray_app import build

        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the paths of Ray's sockets have to be short
        port = free_port()
        ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build(RayConfig.model_validate({"bundle": str(tiny_bundle), **CONFIG})), name="sana")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240) as client:
                yield client
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that no other program uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def expected(tiny_runtime: Any) -> list[Any]:
    """What the runtime draws for the seeds of `BODY`."""
    return [np.asarray(tiny_runtime("a red apple", seed=seed, num_inference_steps=4).images[0]) for seed in (5, 6)]


def pixels(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))) for item in answer.json()["data"]]


def test_images_are_the_runtimes_and_ids_are_the_clients(client: httpx.Client, expected: list[Any]):
    answer = client.post("/v1/images/generations", json=BODY, headers={"x-request-id": "mine-1"})
    assert all(np.array_equal(*pair) for pair in zip(pixels(answer), expected, strict=True))
    assert [value for name, value in answer.headers.multi_items() if name == "x-request-id"] == ["mine-1"]
    with client.stream("POST", "/v1/images/generations", json={**BODY, "n": 1, "stream": True, "partial_images": 2}) as stream:
        kinds = [line.partition(": ")[2] for line in stream.iter_lines() if line.startswith("event: ")]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny-fp32"]
    assert client.get("/health/ready").status_code == 200


def test_a_full_queue_a_wrong_field_and_a_wrong_path_are_errors_of_openai(client: httpx.Client):
    long = {"prompt": "a red apple", "num_inference_steps": 200}
    answers: list[httpx.Response] = []
    together = threading.Barrier(10)

    def ask() -> None:
        together.wait()
        answers.append(client.post("/v1/images/generations", json=long))

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) + sum(answer.status_code == 200 for answer in answers) == 10
    assert refused
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    wrong = client.post("/v1/images/generations", json={"prompt": "x", "stepz": 1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "stepz")
    url = client.post("/v1/images/generations", json={"prompt": "x", "response_format": "url"})
    assert (url.status_code, url.json()["error"]["param"]) == (400, "response_format")
    assert client.get("/nothing").json()["error"]["code"] == "not_found"


def test_a_request_survives_the_death_of_its_replica_and_of_its_front(client: httpx.Client, tiny_runtime: Any):
    body = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 200}
    wanted = np.asarray(tiny_runtime("a red apple", seed=7, num_inference_steps=200).images[0])
    for deployment in ("Drawing", "Front"):
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda into=answers: into.append(client.post("/v1/images/generations", json=body)))
        asking.start()
        wait_for(lambda: "sana_queue_running 1.0" in client.get("/metrics").text)
        (victim,) = (process for process in psutil.Process().children(recursive=True) if f":sana:{deployment}" in _title(process))
        assert asking.is_alive()
        os.kill(victim.pid, signal.SIGKILL)
        if deployment == "Drawing":
            wait_for(lambda: client.get("/health/ready").status_code == 503)  # the only one is gone
        asking.join()
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        assert np.array_equal(pixels(answers[0])[0], wanted)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""
