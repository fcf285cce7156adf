"""What clients of the Ray Serve application see while replicas are killed, it is deployed again and its queue overflows.

python benchmarks/serve/ray_faults.py BUNDLE -o benchmarks/results/ray-faults.json

Starts Ray on this machine with two drawing and two front replicas on the CPU. Clients send one request after the other, without
retries of their own. A request is lost unless it gets status 200 and exactly the image that the runtime draws for its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from ray_clients import PROMPT, SEEDS, STEPS, Clients, Pixels, rounded, summary

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "sana_export.serve.ray.proxy.middlewares",
}

import ray
from ray import serve

from sana_export import SanaRuntime
from sana_export.bench.load_meter import LoadMeter
from sana_export.machine import describe_machine, describe_versions
from sana_export.serve.ray.config import RayConfig
from sana_export.serve.ray_app import build

APP, PORT = "faults", 8765
URL = f"http://127.0.0.1:{PORT}"
#: Clients of every part but the overflow.
CLIENTS = 6
CONFIG: dict[str, Any] = {
    "replicas": 2,
    "front_replicas": 2,
    "gpus_per_replica": 0,
    "cpus_per_replica": 1,
    "cpus_per_front": 0,
    "threads": 1,
    "backend": "onnxruntime",
    "max_ongoing_requests": 4,
    "max_queued_requests": 8,
    "max_batch": 1,
    "health_check_period": 5,
    "timeout": 60,
    "allow_without_keys": True,
}


def main() -> int:
    """Run all parts and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10, help="drawing replicas that are killed, one after the other (default: 10)")
    options = parser.parse_args()
    config = {"bundle": str(options.bundle.resolve()), **CONFIG}
    with SanaRuntime.from_pretrained(options.bundle, backend="onnxruntime", threads=1) as runtime:
        images = [np.asarray(runtime(PROMPT, seed=seed, num_inference_steps=STEPS).images[0]) for seed in range(SEEDS)]
    with ray_on_this_machine() as logs:
        meter = LoadMeter(_ray_seconds)
        deploy(config)
        parts = {
            "without_faults": part(images, lambda clients: time.sleep(10)),
            "kill_drawing": part(images, lambda clients: [kill(clients, "Drawing") for _ in range(options.kills)]),
            "kill_front": part(images, lambda clients: [kill(clients, "Front") for _ in range(3)]),
            "deploy_again": part(images, lambda clients: [deploy_again(config, period) for period in (6, 7)]),
            "overflow": overflow(images),
            "abort": abort(),
        }
        report = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": describe_versions() | {"ray": ray.__version__},
            "other_load": meter.other_load(),
            "config": {**config, "bundle": options.bundle.name},
            "load": {"clients": CLIENTS, "prompt": PROMPT, "seeds": SEEDS, "num_inference_steps": STEPS},
            "peak_memory_bytes": max(_PEAK),
            "sent_again": sent_again(logs),
            "parts": parts,
        }
    options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(options.output)
    return 5 if any(found.get("lost") for found in parts.values()) else 0


def part(images: Sequence[Pixels], faults: Callable[[Clients], Any]) -> dict[str, Any]:
    """The answers to clients that send while `faults` does its work, and what it returns."""
    clients = Clients(URL, images)
    started = time.monotonic()
    with clients.sending(CLIENTS):
        time.sleep(2)
        found = faults(clients)
    return {"seconds": rounded(time.monotonic() - started), **summary(clients.answers), **({"faults": found} if found else {})}


def kill(clients: Clients, deployment: str) -> dict[str, Any]:
    """Kill a replica with SIGKILL, and wait until there are as many as before."""
    before = replicas(deployment)
    victim = sorted(before)[0]
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while len(running := replicas(deployment) - {victim}) < len(before) or not _all_running(deployment, len(before)):
        _note_memory()
        time.sleep(0.1)
    replaced = time.monotonic() - killed
    assert running - before, "no new process"
    time.sleep(3)
    meanwhile = [answer.seconds for answer in clients.answers if answer.started < killed + replaced and answer.ended > killed]
    return {"replaced_after_s": rounded(replaced), "slowest_request_s": rounded(max(meanwhile)), "requests": len(meanwhile)}


def deploy_again(config: dict[str, Any], period: int) -> dict[str, Any]:
    """Deploy with another argument, which replaces every replica."""
    before, started = replicas("Drawing") | replicas("Front"), time.monotonic()
    deploy({**config, "health_check_period": period})
    while before & (replicas("Drawing") | replicas("Front")):
        time.sleep(0.2)
    _note_memory()
    return {"all_replaced_after_s": rounded(time.monotonic() - started)}


def overflow(images: Sequence[Pixels], burst: int = 80) -> dict[str, Any]:
    """Send many requests at once. The replicas and the queue have places for some; the others have to be refused quickly."""
    clients = Clients(URL, images)
    together = threading.Barrier(burst)

    def once(seed: int) -> None:
        with httpx.Client(timeout=120) as client:
            client.get(f"{URL}/health/live")  # connected before the burst
            together.wait()
            clients.answers.append(clients.ask(client, seed))

    threads = [threading.Thread(target=once, args=(seed % SEEDS,)) for seed in range(burst)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in clients.answers if answer.status == 429]
    drawn = [answer for answer in clients.answers if answer.status != 429]
    return {
        "burst": burst,
        "refused": len(refused),
        "codes": sorted({answer.code for answer in refused}),
        "retry_after": sorted({str(answer.retry_after) for answer in refused}),
        "slowest_refusal_s": rounded(max(answer.seconds for answer in refused)),
        **summary(drawn),
    }


def abort(count: int = 8) -> dict[str, Any]:
    """Clients that leave while their images are drawn. How long the replicas draw on shows in the next request."""
    body = {"prompt": PROMPT, "num_inference_steps": 100, "n": 10}
    outcomes: list[str] = []

    def leave() -> None:
        try:
            outcomes.append(str(httpx.post(f"{URL}/v1/images/generations", json=body, timeout=1).status_code))
        except httpx.TimeoutException:
            outcomes.append("left")

    clients = [threading.Thread(target=leave) for _ in range(count)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    left = time.monotonic()
    with httpx.Client(timeout=120) as client:
        client.post(f"{URL}/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 1}).raise_for_status()
    following = time.monotonic() - left
    return {"clients": dict(Counter(outcomes)), "images_each": 10, "steps_each": 100, "next_request_s": rounded(following)}


@contextmanager
def ray_on_this_machine() -> Iterator[Path]:
    """Ray with Serve's proxy. Gives the folder of its logs."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            num_cpus=4,
            object_store_memory=200 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            yield Path(folder) / "session_latest" / "logs"
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy(config: dict[str, Any]) -> None:
    """Deploy, and return when all replicas run."""
    serve.run(build(RayConfig.model_validate(config)), name=APP)


def replicas(deployment: str) -> set[int]:
    """The process ids of the replicas of a deployment."""
    own, name = psutil.Process(), f"ray::ServeReplica:{APP}:{deployment}"
    return {process.pid for process in own.children(recursive=True) if name in _title(process)}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def _all_running(deployment: str, count: int) -> bool:
    return serve.status().applications[APP].deployments[deployment].replica_states == {"RUNNING": count}


_PEAK = [0]


def _note_memory() -> None:
    """The memory of all processes of Ray; what they share counts once for each."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has ended
            continue
    _PEAK.append(total)


def _ray_seconds() -> float:
    """CPU seconds of all processes of Ray that run."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        total += times.user + times.system
    return total


def sent_again(logs: Path) -> int:
    """Requests that lost their replica and were given to another, by the front replicas' logs."""
    return sum(file.read_text("utf-8", errors="replace").count("(1 of 2)") for file in logs.glob("worker-*.err"))


if __name__ == "__main__":
    sys.exit(main())
