"""deploy/: the Dockerfile, the compose file and the manifest say what the code and their schemas take. None of them runs here."""

from __future__ import annotations

import fnmatch
import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from sana_export.cli.main import parse

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
#: Files that hold weights.
WEIGHTS = ("*.safetensors", "*.onnx", "*.data", "*.bin", "*.pt", "*.pth", "*.engine")
#: The keys of the Compose specification that a service and its parts may have, of those that we use.
SERVICE = {
    *("build", "cap_drop", "command", "deploy", "image", "ports", "profiles", "read_only", "restart", "secrets", "security_opt"),
    *("stop_grace_period", "tmpfs", "volumes"),
}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions with their arguments, comments and line ends removed."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


@pytest.fixture(scope="module")
def lines() -> list[tuple[str, str]]:
    return instructions((DEPLOY / "Dockerfile").read_text("utf-8"))


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def manifest() -> Any:
    return yaml.safe_load((DEPLOY / "rayservice.yaml").read_text("utf-8"))


def values(lines: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in lines if name == word]


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])


def served(words: list[str]) -> Any:
    """The options of the command of a container, whose entry point is `sana-export`."""
    return parse(words)


def test_the_proxies_of_ray_answer_errors_in_openais_form(lines: list[tuple[str, str]]) -> None:
    (words,) = values(lines, "ENV")[-1:]
    named = dict(word.split("=", 1) for word in words.split())["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    module, _, name = named.rpartition(".")
    assert [middleware.cls.__name__ for middleware in getattr(importlib.import_module(module), name)()] == ["SecondTry"]


def test_the_image_runs_as_a_user_without_rights_from_a_base_with_a_version(lines: list[tuple[str, str]]) -> None:
    bases = [rest.split()[0] for rest in values(lines, "FROM")]
    assert all(re.fullmatch(r"python:\$\{PYTHON\}-slim-bookworm", base) for base in bases)
    assert re.fullmatch(r"PYTHON=3\.\d+", values(lines, "ARG")[0])
    names = [name for name, _ in lines]
    last = len(names) - 1 - names[::-1].index("FROM")
    assert "RUN" not in names[names.index("USER", last) :]  # nothing else runs as root, and what runs later does not
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", values(lines, "USER")[-1])  # a number: Kubernetes' runAsNonRoot checks it
    assert not values(lines, "ADD")
    for command in values(lines, "RUN"):
        assert "--no-install-recommends" in command or "apt-get install" not in command
        assert "rm -rf /var/lib/apt/lists/*" in command or "apt-get update" not in command
        assert "--no-cache-dir" in command or "pip install" not in command


def test_the_image_is_built_from_the_package_alone_and_without_weights(lines: list[tuple[str, str]]) -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").split("*\n", 1)[1].splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {word for rest in values(lines, "COPY") if "--from" not in rest for word in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    left_out = [line for line in ignore if not line.startswith("!")]
    tracked = subprocess.run(["git", "ls-files", *sorted(kept)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sent = [name for name in tracked.splitlines() if not name.startswith(tuple(f"{line}/" for line in left_out))]
    assert "sana_export/cli/main.py" in sent
    assert not [name for name in sent if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)]


def test_every_extra_exists(lines: list[tuple[str, str]], compose: Any, manifest: Any) -> None:
    texts = [(DEPLOY / name).read_text("utf-8") for name in ("Dockerfile", "compose.yaml", "rayservice.yaml")]
    texts.append((ROOT / "docs" / "deploy.md").read_text("utf-8"))
    named = {extra for text in texts for found in re.findall(r"EXTRAS[=:] ?([a-z][\w,-]*)", text) for extra in found.split(",")}
    assert {"cpu", "serve", "tensorrt-rtx"} <= named <= extras()


def test_the_command_of_the_image_is_one_that_the_server_takes(lines: list[tuple[str, str]]) -> None:
    assert values(lines, "ENTRYPOINT") == ['["sana-export"]']
    options = served(yaml.safe_load(values(lines, "CMD")[0]))
    assert (options.verb, options.bundle, options.host) == ("serve", "/bundle", "0.0.0.0")
    assert options.api_keys == Path("/run/secrets/api-keys")
    assert values(lines, "EXPOSE") == [str(options.port)]
    (check,) = values(lines, "HEALTHCHECK")
    url = yaml.safe_load(check[check.index("[") :])[-1]
    assert url == f"http://127.0.0.1:{options.port}/health/live"
    routes = (ROOT / "sana_export" / "serve" / "app.py").read_text("utf-8")
    assert '"/health/live"' in routes


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_service_is_confined_and_its_command_parses(compose: Any, name: str) -> None:
    service = compose["services"][name]
    assert set(service) <= SERVICE
    assert served(service["command"]).api_keys == Path("/run/secrets/api-keys")
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    bundle, cache = service["volumes"]
    assert (bundle["target"], bundle["read_only"]) == ("/bundle", True)
    assert cache.partition(":")[0] in compose["volumes"]
    assert service["secrets"] == list(compose["secrets"]) == ["api-keys"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert (ROOT / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert (DEPLOY / service["build"]["context"]).samefile(ROOT)
    assert ("deploy" in service) == (name == "cuda")


def test_running_requests_have_time_to_finish(compose: Any) -> None:
    for service in compose["services"].values():
        shutdown = served(service["command"]).shutdown_timeout or 120.0  # the default of `serve`
        assert float(service["stop_grace_period"].removesuffix("s")) > shutdown


def test_the_manifest_is_a_rayservice_whose_pods_are_confined(manifest: Any) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert set(manifest["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert set(groups[0]) == {"rayStartParams", "template"}
    assert set(groups[1]) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert all(mount["readOnly"] for mount in container["volumeMounts"])
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_rays_own_schema_takes_the_application(manifest: Any) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed (pip install '.[ray]')")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, function = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), function)
    taken = build.__annotations__["config"](**application.args)
    cluster = manifest["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (taken.min_replicas, taken.max_replicas) == (workers["minReplicas"], workers["maxReplicas"])
    (container,) = workers["template"]["spec"]["containers"]
    assert taken.gpus_per_replica == float(container["resources"]["limits"]["nvidia.com/gpu"])
    cores = taken.cpus_per_replica + taken.front_replicas * taken.cpus_per_front
    assert float(container["resources"]["limits"]["cpu"]) >= cores  # one worker can run it all
    mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    for path in (Path(taken.bundle), taken.keys_file):
        assert any(path.is_relative_to(mount) for mount in mounts)


def test_the_commands_in_the_documents_and_comments_name_files_that_exist() -> None:
    texts = [path.read_text("utf-8") for path in (*DEPLOY.glob("*"), ROOT / "docs" / "deploy.md") if path.is_file()]
    named = {word for text in texts for word in re.findall(r"deploy/[\w./-]+", text)}
    assert named
    assert not [name for name in named if not (ROOT / name.rstrip(".")).exists()]


def test_the_check_of_instructions_finds_what_it_looks_for() -> None:
    found = instructions("# a\nFROM a AS b\nRUN x \\\n    && y\nUSER 0\n")
    assert found == [("FROM", "a AS b"), ("RUN", "x      && y"), ("USER", "0")]
    assert shlex.split(found[1][1]) == ["x", "&&", "y"]
