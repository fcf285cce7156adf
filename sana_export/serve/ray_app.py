"""The Ray Serve application: `serve run sana_export.serve.ray_app:build bundle=FOLDER allow_without_keys=true`.

    client -> Serve's proxy -> Front: the HTTP application of app.py over a RayEngine -> Drawing: a LocalEngine -> GPU

Front replicas check requests, choose seeds and encode answers; Drawing replicas draw. docs/ray.md has every argument.
"""

# No `from __future__ import annotations`: Ray reads the annotation of `build` and wants the class itself.
from typing import Any

from sana_export.errors import DependencyError
from sana_export.installation import install_command

try:
    from ray import serve
    from ray.serve import Application
except ImportError as error:
    raise DependencyError(
        "Ray Serve is not installed", found=str(error), wanted="ray[serve]", fix=install_command("ray")
    ) from error

from sana_export.serve.ray.config import SPARE_SECONDS, RayConfig
from sana_export.serve.ray.front import DRAWING, FrontReplica
from sana_export.serve.ray.replica import DrawingReplica

#: Ray's own bounds, far above those of the front, which refuses in OpenAI's form what it has no place for.
NEVER_REACHED = 100_000


def build(config: RayConfig) -> Application:
    """The application for `serve run` and for the `import_path` of a Serve config file."""
    drawing = serve.deployment(**_drawing_options(config))(DrawingReplica)
    front = serve.deployment(**_front_options(config))(serve.ingress()(FrontReplica))
    return front.bind(drawing.bind(config), config)


def _drawing_options(config: RayConfig) -> dict[str, Any]:
    return {
        **_count(config),
        "name": DRAWING,
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": NEVER_REACHED,
        "health_check_period_s": config.health_check_period,
        "health_check_timeout_s": config.longest_health_check + SPARE_SECONDS,
        "graceful_shutdown_timeout_s": config.longest_shutdown,
    }


def _front_options(config: RayConfig) -> dict[str, Any]:
    return {
        "name": "Front",
        "num_replicas": config.front_replicas,
        "ray_actor_options": {"num_cpus": config.cpus_per_front},
        "max_ongoing_requests": NEVER_REACHED,
        "max_queued_requests": NEVER_REACHED,
        "health_check_period_s": config.health_check_period,
        # A request in the front lasts as long as in the replica that draws it, and once more if that one dies.
        "graceful_shutdown_timeout_s": config.longest_shutdown + SPARE_SECONDS,
    }


def _count(config: RayConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_requests,
            "upscale_delay_s": config.upscale_seconds,
            "downscale_delay_s": config.downscale_seconds,
        }
    }
