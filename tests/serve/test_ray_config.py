"""The arguments of the Ray Serve application, and the deployments that they make."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app

from sana_export.adapters import Lora
from sana_export.errors import DependencyError, UsageError
from sana_export.installation import install_command
from sana_export.serve.engine import ModelCard
from sana_export.serve.errors import Refusal
from sana_export.serve.jobs import image_job
from sana_export.serve.ray.config import RayConfig
from sana_export.serve.ray_app import build
from sana_export.serve.schema import GenerationBody
from sana_export.serve.security import Caller

OPEN = {"bundle": "models/tiny", "allow_without_keys": True}


def deployments(**arguments: Any) -> dict[str, Any]:
    """The deployments that Ray makes of the arguments, by name."""
    app = call_user_app_builder_with_args_if_necessary(build, arguments)
    assert isinstance(app, Application)
    return {item.name: item for item in build_app(app, name="sana").deployments}


def test_every_argument_is_documented():
    table = (Path(__file__).parents[2] / "docs" / "ray.md").read_text("utf-8").partition("## Arguments")[2].partition("\n### ")[0]
    assert [name for name in RayConfig.model_fields if f"`{name}`" not in table] == []


def test_strings_of_a_command_line_become_numbers():
    config = RayConfig.model_validate({"bundle": "tiny", "replicas": "3", "gpus_per_replica": "0.5", "allow_without_keys": "true"})
    assert (config.replicas, config.gpus_per_replica, config.allow_without_keys) == (3, 0.5, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({**OPEN, "replica": 2}, "replica\n  Extra inputs are not permitted"),
        ({**OPEN, "limits": {"pixel": 2}}, "Unexpected keyword argument"),
        ({"allow_without_keys": True}, "one of bundle and models is needed"),
        ({**OPEN, "models": [{"name": "a", "bundle": "b"}]}, "one of bundle and models is needed"),
        ({**OPEN, "models": [{"name": "a", "bundel": "b"}]}, "models.0.bundel"),
        ({**OPEN, "min_replicas": 3, "max_replicas": 2}, "max_replicas is 2: it must be at least min_replicas, 3"),
        ({**OPEN, "max_replicas": 2, "target_requests": 9}, "replicas have at most max_ongoing_requests, 8"),
        ({"bundle": "tiny"}, "keys_file is missing"),
        ({**OPEN, "max_queued_requests": -1}, "max_queued_requests"),
        ({**OPEN, "replicas": 0}, "replicas"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], words: str):
    with pytest.raises(ValidationError) as caught:
        RayConfig.model_validate(arguments)
    assert words in str(caught.value)


def test_the_deployments_have_bounded_queues_and_time_to_drain():
    made = deployments(**OPEN, replicas=2, max_ongoing_requests=4, timeout=40, health_check_period=7)
    drawing, front = made["Drawing"], made["Front"]
    assert drawing.num_replicas == 2
    assert drawing.max_ongoing_requests == 4
    # The front has the bound: Ray's are plain text.
    assert min(drawing.max_queued_requests, front.max_queued_requests, front.max_ongoing_requests) == 100_000
    assert RayConfig.model_validate({**OPEN, "max_queued_requests": 5}).in_front({}).queue.places == 5
    assert drawing.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 1.0}
    options = drawing._deployment_config
    # What runs may take 40 s. A health image too, and 30 s more until Ray counts it as failed.
    assert (options.graceful_shutdown_timeout_s, options.health_check_period_s, options.health_check_timeout_s) == (70, 7, 70)
    assert front.num_replicas == 2
    assert front.ray_actor_options["num_cpus"] == 1.0
    assert front._deployment_config.graceful_shutdown_timeout_s == 100


def test_the_queue_of_a_front_has_room_for_every_key(tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("".join(f"user{index}:{index:020}\n" for index in range(3)))
    arguments = {"bundle": "tiny", "keys_file": keys}
    assert len(RayConfig.model_validate({**arguments, "max_queued_requests": 3}).keys()) == 3
    with pytest.raises(UsageError, match="one request of each API key") as caught:
        RayConfig.model_validate({**arguments, "max_queued_requests": 2}).keys()
    assert caught.value.fix == "max_queued_requests=3"


def test_autoscaling_counts_the_requests_that_wait_or_run():
    scaling = deployments(**OPEN, min_replicas=0, max_replicas=8, target_requests=3, downscale_seconds=60)["Drawing"]
    policy = scaling._deployment_config.autoscaling_config
    assert (policy.min_replicas, policy.max_replicas, policy.get_target_ongoing_requests()) == (0, 8, 3.0)
    assert (policy.upscale_delay_s, policy.downscale_delay_s) == (10.0, 60.0)


def test_the_least_number_of_replicas():
    cases = ({"replicas": 3}, 3), ({"max_replicas": 4}, 1), ({"min_replicas": 0, "max_replicas": 4, "replicas": 2}, 0)
    assert [RayConfig.model_validate({**OPEN, **arguments}).least_replicas for arguments, _ in cases] == [3, 1, 0]


def test_replicas_and_fronts_are_told_the_same_models_and_limits():
    models = [
        {"name": "apple", "bundle": "b", "loras": [{"path": "red.safetensors", "scale": 0.5}]},
        {"name": "plain", "bundle": "b"},
    ]
    config = RayConfig.model_validate(
        {"models": models, "allow_without_keys": True, "limits": {"images": 4}, "max_ongoing_requests": 5}
    )
    replica, front = config.in_replica(), config.in_front({"team": "secret"})
    assert replica.models == front.models
    assert [model.name for model in replica.models] == ["apple", "plain"]
    assert replica.models[0].loras == (Lora(Path("red.safetensors"), 0.5),)
    assert replica.limits == front.limits
    assert front.limits.images == 4
    # A replica holds 5 requests of 4 images and the one of a health check, so it refuses none that Ray sends.
    assert replica.queue.places == 21
    assert front.keys == {"team": "secret"}
    assert not replica.keys
    assert RayConfig.model_validate(OPEN).in_replica().models[0].name == "tiny"


def test_a_front_refuses_urls_before_anything_is_drawn():
    body, caller = GenerationBody(prompt="x", response_format="url"), Caller("", "r1")
    with pytest.raises(Refusal, match="ask for b64_json") as caught:
        image_job(body, (ModelCard("tiny", 0, False, 128),), RayConfig.model_validate(OPEN).in_front({}), caller, timeout=5)
    assert caught.value.param == "response_format"


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name == "ray" or name.startswith(("ray.", "sana_export.serve.ray"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match="Ray Serve is not installed") as caught:
        importlib.import_module("sana_export.serve.ray_app")
    assert (caught.value.fix, caught.value.exit_code) == (install_command("ray"), 3)
