"""The routes over a stand-in engine: OpenAI's answers and errors, whatever a client sends."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sana_export.errors import ArtifactError, DependencyError
from sana_export.serve.app import create_app
from sana_export.serve.config import ModelConfig, RequestLimits, ServeConfig
from sana_export.serve.errors import CODES, Refusal
from tests.support.serving import StandInEngine, color, image_file, picture, pixel, running, wait_for

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
LIMITS = RequestLimits(
    prompt_characters=50,
    pixels=512 * 512,
    images=4,
    steps=20,
    json_bytes=2000,
    body_bytes=20_000,
    source_pixels=4096,
    body_seconds=0.5,
)
KEYS = {"alice": "alice-secret-0123456789", "bob": "bob-secret-0123456789"}
CONFIG = ServeConfig((ModelConfig("first", "unused"),), port=0, limits=LIMITS)
PNG = image_file(picture(5))


@pytest.fixture(scope="module")
def module_engine() -> StandInEngine:
    return StandInEngine()


@pytest.fixture(scope="module")
def address(module_engine: StandInEngine) -> Iterator[str]:
    with running(module_engine, CONFIG) as found:
        yield found


@pytest.fixture
def engine(module_engine: StandInEngine) -> StandInEngine:
    module_engine.__init__()  # type: ignore[misc]
    return module_engine


@pytest.fixture
def client(address: str, engine: StandInEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=20) as found:
        yield found


def checked_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of an error, after a check of its form."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == CODES[code][1]
    return str(error["message"])


def test_an_answer_has_openais_form(client: httpx.Client, engine: StandInEngine) -> None:
    body = {"prompt": "a cat", "n": 2, "seed": 7, "size": "64x96", "negative_prompt": "a dog", "num_inference_steps": 3}
    answer = client.post(GENERATIONS, json={**body, "guidance_scale": 2, "pag_scale": 1.5, "scheduler": "unipc", "user": "u"})
    document = answer.json()
    assert answer.status_code == 200
    assert [pixel(base64.b64decode(item["b64_json"])) for item in document["data"]] == [color(7), color(8)]
    assert [item["seed"] for item in document["data"]] == [7, 8]
    assert (document["size"], document["output_format"], document["model"]) == ("8x8", "png", "first")
    assert document["timings"] == {"queue": 0.5, "denoise_loop": 1.5}
    words = {"prompt": "a cat", "negative_prompt": "a dog", "num_inference_steps": 3, "guidance_scale": 2.0, "pag_scale": 1.5}
    assert dict(engine.jobs[0].words) == {**words, "scheduler": "unipc", "height": 96, "width": 64}
    assert (engine.jobs[0].seeds, engine.jobs[0].timeout, engine.jobs[0].key) == ((7, 8), 120.0, "")


def test_defaults_are_the_models_own_and_a_random_seed(client: httpx.Client, engine: StandInEngine) -> None:
    seeds = {client.post(GENERATIONS, json={"prompt": "x", "size": "auto", "n": None}).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert [dict(job.words) for job in engine.jobs] == [{"prompt": "x"}] * 3
    assert {job.model for job in engine.jobs} == {"first"}


@pytest.mark.parametrize(
    ("fields", "word", "quality"),
    [
        ({}, "png", None),
        ({"output_format": "jpeg"}, "jpg", None),
        ({"output_format": "jpeg", "output_compression": 0}, "jpg", 1),
        ({"output_format": "webp", "output_compression": 60}, "webp", 60),
    ],
)
def test_the_format_of_the_files(
    client: httpx.Client, engine: StandInEngine, fields: dict[str, Any], word: str, quality: Any
) -> None:
    assert client.post(GENERATIONS, json={"prompt": "x", **fields}).status_code == 200
    assert (engine.jobs[0].output_format, engine.jobs[0].quality) == (word, quality)


def test_the_largest_seeds(client: httpx.Client) -> None:
    items = client.post(GENERATIONS, json={"prompt": "x", "seed": 2**63 - 2, "n": 2}).json()["data"]
    assert [item["seed"] for item in items] == [2**63 - 2, 2**63 - 1]


def test_a_url_leads_to_the_file_under_a_name_nobody_guesses(client: httpx.Client, engine: StandInEngine) -> None:
    item = client.post(GENERATIONS, json={"prompt": "x", "seed": 9, "response_format": "url"}).json()["data"][0]
    assert "b64_json" not in item
    assert re.fullmatch(re.escape(str(client.base_url)) + r"/images/[\w-]{32}\.png", item["url"])
    answer = client.get(item["url"])
    assert (answer.headers["content-type"], pixel(answer.content)) == ("image/png", color(9))
    for name in ("x.png", "..%2f..%2fetc%2fpasswd", "%00", item["url"].rpartition("/")[2][:-1]):
        checked_error(client.get(f"/images/{name}"), 404, "not_found")


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [(kind, json.loads(data)) for kind, data in re.findall(r"event: (\S+)\ndata: (.*)\n\n", text)]


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_a_stream_has_previews_and_then_the_images(client: httpx.Client, engine: StandInEngine, kind: str) -> None:
    fields = {"prompt": "x", "seed": "3", "n": "2", "stream": "true", "partial_images": "2"}
    if kind == "image_edit":
        answer = client.post(EDITS, data=fields, files={"image": PNG})
    else:
        answer = client.post(GENERATIONS, json={"prompt": "x", "seed": 3, "n": 2, "stream": True, "partial_images": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [name for name, _ in events] == [f"{kind}.partial_image"] * 2 + [f"{kind}.completed"] * 2
    assert all(event["type"] == name and event["output_format"] == "png" for name, event in events)
    assert [event.get("partial_image_index") for _, event in events] == [0, 1, None, None]
    assert [event["seed"] for _, event in events] == [3, 3, 3, 4]
    assert [pixel(base64.b64decode(event["b64_json"])) for _, event in events] == [color(seed) for seed in (1000, 1001, 3, 4)]


def test_an_error_after_the_stream_began_is_its_last_event(client: httpx.Client, engine: StandInEngine) -> None:
    engine.error = Refusal("timeout", "too late")
    answer = client.post(GENERATIONS, json={"prompt": "x", "stream": True})
    assert answer.status_code == 200
    error = {"message": "too late", "type": "server_error", "param": None, "code": "timeout"}
    assert events_of(answer.text) == [("error", {"type": "error", "error": error})]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_logged(
    client: httpx.Client, engine: StandInEngine, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = ZeroDivisionError("/secret")
    answer = client.post(GENERATIONS, json={"prompt": "x", "stream": stream}, headers={"X-Request-Id": "r7"})
    assert "internal_error" in answer.text
    assert "secret" not in answer.text
    [record] = [record for record in caplog.records if record.getMessage() == "request r7 failed"]
    assert record.exc_info is not None
    assert record.exc_info[1] is engine.error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (Refusal("queue_full", "full", retry_after=17), 429, "queue_full", "17"),
        (Refusal("shutting_down", "ending"), 503, "shutting_down", "5"),
        (Refusal("timeout", "late"), 504, "timeout", None),
        (DependencyError("no memory", fix="rm /secret"), 503, "out_of_resources", "5"),
        (ArtifactError("/secret is damaged"), 500, "model_damaged", None),
        (KeyError("/secret"), 500, "internal_error", None),
    ],
)
def test_errors_of_the_engine(
    client: httpx.Client, engine: StandInEngine, stream: bool, error: Exception, status: int, code: str, retry: str | None
) -> None:
    engine.refusal = error
    answer = client.post(GENERATIONS, json={"prompt": "x", "stream": stream})
    assert "secret" not in checked_error(answer, status, code)
    assert answer.headers.get("retry-after") == retry


BAD_JSON: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "invalid_json", None),
    "text": (b"hello", "invalid_json", None),
    "array": (b"[]", "invalid_value", None),
    "nested": (b"[" * 1900, "invalid_json", None),
    "nested objects": (b'{"a":' * 390, "invalid_json", None),
    "not utf-8": (b'{"prompt":"\xff"}', "invalid_json", None),
    "lone surrogate": (b'{"prompt":"\\ud800"}', "invalid_json", None),
    "nan": (b'{"prompt":"a","guidance_scale":NaN}', "invalid_value", "guidance_scale"),
    "infinity": (b'{"prompt":"a","guidance_scale":-Infinity}', "invalid_value", "guidance_scale"),
    "overflow": (b'{"prompt":"a","pag_scale":1e999}', "invalid_value", "pag_scale"),
    "huge seed": (b'{"prompt":"a","seed":18446744073709551616}', "invalid_value", "seed"),
    "long number": (b'{"prompt":"a","seed":' + b"9" * 1900 + b"}", "invalid_value", "seed"),
    "seeds beyond the largest": (b'{"prompt":"a","seed":9223372036854775807,"n":2}', "invalid_value", "seed"),
    "no prompt": (b"{}", "missing_required_parameter", "prompt"),
    "empty prompt": (b'{"prompt":""}', "invalid_value", "prompt"),
    "prompt of a list": (b'{"prompt":["a"]}', "invalid_value", "prompt"),
    "long prompt": (b'{"prompt":"' + b"a" * 51 + b'"}', "invalid_value", "prompt"),
    "long negative prompt": (b'{"prompt":"a","negative_prompt":"' + b"a" * 51 + b'"}', "invalid_value", "negative_prompt"),
    "unknown": (b'{"prompt":"a","moderation":"low"}', "unknown_parameter", "moderation"),
    "text as a number": (b'{"prompt":"a","n":"2"}', "invalid_value", "n"),
    "boolean as a number": (b'{"prompt":"a","n":true}', "invalid_value", "n"),
    "no image": (b'{"prompt":"a","n":0}', "invalid_value", "n"),
    "many images": (b'{"prompt":"a","n":5}', "invalid_value", "n"),
    "many steps": (b'{"prompt":"a","num_inference_steps":21}', "invalid_value", "num_inference_steps"),
    "no size": (b'{"prompt":"a","size":"large"}', "invalid_value", "size"),
    "newline in size": (b'{"prompt":"a","size":"64x64\\n"}', "invalid_value", "size"),
    "large size": (b'{"prompt":"a","size":"512x513"}', "invalid_value", "size"),
    "transparent": (b'{"prompt":"a","background":"transparent"}', "invalid_value", "background"),
    "previews without a stream": (b'{"prompt":"a","partial_images":1}', "invalid_value", "partial_images"),
    "stream of urls": (b'{"prompt":"a","stream":true,"response_format":"url"}', "invalid_value", "response_format"),
    "compressed png": (b'{"prompt":"a","output_compression":50}', "invalid_value", "output_compression"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json(client: httpx.Client, engine: StandInEngine, case: str) -> None:
    content, code, param = BAD_JSON[case]
    answer = client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    checked_error(answer, 400, code, param)
    assert engine.jobs == []


def test_an_unknown_model(client: httpx.Client) -> None:
    checked_error(client.post(GENERATIONS, json={"prompt": "a", "model": "third"}), 404, "model_not_found", "model")
    checked_error(client.get("/v1/models/third"), 404, "model_not_found", "model")
    assert client.post(GENERATIONS, json={"prompt": "a", "model": "second"}).json()["model"] == "second"


def test_other_routes_methods_and_types(client: httpx.Client) -> None:
    checked_error(client.get("/v2/images"), 404, "not_found")
    checked_error(client.get("/v1/models/"), 404, "not_found")
    for path in ("/health/live", "/health/ready"):
        assert (client.head(path).status_code, client.head(path).content) == (200, b"")
    answer = client.get(GENERATIONS)
    checked_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    checked_error(client.post(GENERATIONS, data={"prompt": "a"}), 415, "unsupported_media_type")
    checked_error(client.post(EDITS, json={"prompt": "a"}), 415, "unsupported_media_type")


def test_bodies_have_a_size_and_a_time(client: httpx.Client, engine: StandInEngine) -> None:
    checked_error(client.post(GENERATIONS, json={"prompt": "a" * 3000}), 413, "body_too_large")
    headers = {"Content-Type": "application/json"}
    chunks = (b"x" * 500 for _ in range(100))  # without a Content-Length
    answer = client.post(GENERATIONS, content=chunks, headers=headers)
    checked_error(answer, 413, "body_too_large")
    assert answer.headers["connection"] == "close"
    checked_error(client.post(EDITS, data={"prompt": "a"}, files={"image": b"x" * 30_000}), 413, "body_too_large")
    assert engine.jobs == []


def test_all_bodies_together_have_a_size(engine: StandInEngine) -> None:
    with running(engine, replace(CONFIG, limits=replace(LIMITS, held_bytes=1500))) as address:
        answer = httpx.post(address + EDITS, data={"prompt": "a"}, files={"image": b"x" * 2000})
        checked_error(answer, 503, "out_of_resources")
        assert httpx.post(address + EDITS, data={"prompt": "a"}, files={"image": PNG}).status_code == 200  # nothing is held now


def test_the_body_of_a_streamed_edit_is_held_until_the_stream_ends(engine: StandInEngine) -> None:
    one_body = 2 * len(PNG) + 1500  # with the form around it
    fields, files = {"prompt": "a", "stream": "true"}, {"image": PNG + bytes(len(PNG) + 600)}
    with running(engine, replace(CONFIG, limits=replace(LIMITS, held_bytes=one_body))) as address, httpx.Client() as client:
        engine.endless = True
        with client.stream("POST", address + EDITS, data=fields, files=files) as stream:
            assert stream.status_code == 200
            checked_error(httpx.post(address + EDITS, data=fields, files=files), 503, "out_of_resources")
        wait_for(lambda: len(engine.left) == 1)  # the client went away
        engine.endless = False
        for _ in range(3):
            assert events_of(httpx.post(address + EDITS, data=fields, files=files).text)[-1][0] == "image_edit.completed"


def test_an_edit_hands_over_the_image_the_mask_and_the_fields(client: httpx.Client, engine: StandInEngine) -> None:
    mask = image_file(Image.new("RGBA", (8, 8)))
    fields = {"prompt": "ä cat", "strength": "0.5", "seed": "4", "n": "2", "guidance_scale": "3", "size": "64x64"}
    answer = client.post(EDITS, data=fields, files={"image[]": ("a.png", PNG, "image/png"), "mask": mask})
    assert [item["seed"] for item in answer.json()["data"]] == [4, 5]
    job = engine.jobs[0]
    assert (job.image, job.mask, job.seeds) == (PNG, mask, (4, 5))
    assert dict(job.words) == {"prompt": "ä cat", "strength": 0.5, "guidance_scale": 3.0, "height": 64, "width": 64}


def test_an_image_may_be_a_data_url_and_nothing_else(client: httpx.Client, engine: StandInEngine, tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert client.post(EDITS, files={"prompt": (None, "x"), "image": (None, url)}).status_code == 200
    assert engine.jobs[0].image == PNG
    (tmp_path / "x.png").write_bytes(PNG)
    others = (str(tmp_path / "x.png"), (tmp_path / "x.png").as_uri(), "http://127.0.0.1:1/x.png", "data:image/png;base64,?", "")
    for text in others:
        answer = client.post(EDITS, files={"prompt": (None, "x"), "image": (None, text)})
        checked_error(answer, 400, "invalid_image", "image")
    assert len(engine.jobs) == 1


BAD_FORMS: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "invalid_multipart", None),
    "no parts": (b"--x--\r\n", "missing_required_parameter", "image"),
    "cut": (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na', "invalid_multipart", None),
    "no name": (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", "invalid_multipart", None),
    "not a field": (b'--x\r\nContent-Disposition: inline; name="a"\r\n\r\na\r\n--x--\r\n', "invalid_multipart", None),
    "twice": (
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n' * 2 + b"--x--\r\n",
        "invalid_multipart",
        "prompt",
    ),
    "many": (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\na\r\n' * 65 + b"--x--\r\n", "invalid_multipart", None),
}


@pytest.mark.parametrize("case", BAD_FORMS)
def test_bad_forms(client: httpx.Client, engine: StandInEngine, case: str) -> None:
    content, code, param = BAD_FORMS[case]
    answer = client.post(EDITS, content=content, headers={"Content-Type": "multipart/form-data; boundary=x"})
    checked_error(answer, 400, code, param)
    assert engine.jobs == []


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": b"\xff"}, "invalid_multipart", "prompt"),
        ({"prompt": b"a", "n": b"two"}, "invalid_value", "n"),
        ({"prompt": b"a", "strength": b"nan"}, "invalid_value", "strength"),
        ({"prompt": b"a", "strength": b"0"}, "invalid_value", "strength"),
        ({"prompt": b"a", "input_fidelity": b"high"}, "unknown_parameter", "input_fidelity"),
        ({}, "missing_required_parameter", "prompt"),
    ],
)
def test_bad_fields_of_a_form(client: httpx.Client, fields: dict[str, bytes], code: str, param: str) -> None:
    parts = {name: (None, value) for name, value in fields.items()}
    checked_error(client.post(EDITS, files={"image": PNG, **parts}), 400, code, param)


def test_a_request_may_ask_for_less_time(client: httpx.Client, engine: StandInEngine) -> None:
    for header, seconds in (("2.5", 2.5), ("1e6", 120.0)):
        assert client.post(GENERATIONS, json={"prompt": "a"}, headers={"X-Request-Timeout": header}).status_code == 200
        assert engine.jobs[-1].timeout == seconds
    for header in ("0", "-1", "nan", "inf", "soon"):
        checked_error(client.post(GENERATIONS, json={"prompt": "a"}, headers={"X-Request-Timeout": header}), 400, "invalid_value")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_job(client: httpx.Client, engine: StandInEngine, stream: bool) -> None:
    engine.endless = True
    headers = {"X-Request-Id": f"gone-{stream}"}
    with pytest.raises(httpx.ReadTimeout):
        client.post(GENERATIONS, json={"prompt": "a", "stream": stream}, headers=headers, timeout=0.3)
    wait_for(lambda: engine.left == [f"gone-{stream}"])


def test_every_answer_has_an_id_and_safe_headers(client: httpx.Client) -> None:
    for answer in (client.get("/v1/models"), client.get("/nothing"), client.get("/docs"), client.post(GENERATIONS, json={})):
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers
    assert client.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/v1/models", headers={"X-Request-Id": "a" * 65}).headers["x-request-id"] != "a" * 65


def test_foreign_pages_and_foreign_names_stay_out(client: httpx.Client, engine: StandInEngine) -> None:
    checked_error(
        client.post(GENERATIONS, json={"prompt": "a"}, headers={"Origin": "https://evil.example"}), 403, "forbidden_origin"
    )
    checked_error(client.options(GENERATIONS, headers={"Origin": "null"}), 403, "forbidden_origin")
    for host in ("evil.example", "127.0.0.1.evil.example:80", "[", ""):
        checked_error(client.get("/v1/models", headers={"Host": host}), 421, "misdirected")
    own = client.base_url.netloc.decode()
    assert client.post(GENERATIONS, json={"prompt": "a"}, headers={"Origin": f"http://{own}"}).status_code == 200
    assert client.get("/v1/models", headers={"Host": "LOCALHOST:9"}).status_code == 200
    assert len(engine.jobs) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "Server.example"])
def test_without_keys_foreign_names_stay_out_on_every_address(engine: StandInEngine, host: str) -> None:
    def status(name: str) -> int:
        return client.get("/v1/models", headers={"Host": name}).status_code

    config = replace(CONFIG, host=host, allow_without_keys=True, public_url="https://public.example/sana")
    with TestClient(create_app(engine, config)) as client:
        assert [status(name) for name in ("evil.example", "public.example.evil", "")] == [421] * 3
        assert [status(name) for name in ("10.0.0.7:8000", "[::1]:80", "localhost", "PUBLIC.example")] == [200] * 4
        assert status("server.example:80") == (200 if host == "Server.example" else 421)


def test_keys(engine: StandInEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(engine, replace(CONFIG, keys=KEYS)) as address, httpx.Client(base_url=address) as client:
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {KEYS['bob']}"},
            {"Authorization": b"\xff"},
        ):
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = client.get(path, headers=header)
                checked_error(answer, 401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health/live", "/health/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        bob = {"Authorization": f"Bearer {KEYS['bob']}", "Host": "any.example"}
        answer = client.post(GENERATIONS, json={"prompt": "a", "response_format": "url"}, headers=bob)
        assert (answer.status_code, engine.jobs[0].key) == (200, "bob")
        assert client.get("/images/" + answer.json()["data"][0]["url"].rpartition("/")[2]).status_code == 200
        metrics = client.get("/metrics", headers=bob).text
    assert 'sana_requests_total{key="bob",route="/v1/images/generations",status="200"} 1.0' in metrics
    assert "key=bob" in caplog.text
    assert not any(key in caplog.text + metrics for key in KEYS.values())


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_logged_only_if_asked_for(engine: StandInEngine, caplog: pytest.LogCaptureFixture, wanted: bool) -> None:
    caplog.set_level(logging.DEBUG)
    with running(engine, replace(CONFIG, log_prompts=wanted)) as address:
        httpx.post(address + GENERATIONS, json={"prompt": "my secret wish"})
        httpx.post(address + GENERATIONS, json={"prompt": "my secret wish", "n": 99})
        httpx.post(address + GENERATIONS, content=b'{"prompt": "my secret wish"', headers={"Content-Type": "application/json"})
    assert ("secret wish" in caplog.text) == wanted


def test_models_health_and_metrics(client: httpx.Client, engine: StandInEngine) -> None:
    models = client.get("/v1/models").json()
    assert (models["object"], [model["id"] for model in models["data"]]) == ("list", ["first", "second"])
    assert client.get("/v1/models/second").json() == models["data"][1]
    assert client.get("/health/ready").json() == client.get("/health/live").json() == {"status": "ok"}
    engine.draining = True
    assert "shutting down" in checked_error(client.get("/health/ready"), 503, "not_ready")
    assert client.get("/health/live").status_code == 200

    def value(name: str) -> float:
        return float((re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE) or ["", "0"])[1])

    names = (
        'sana_images_total{model="first"}',
        'sana_stage_seconds_sum{model="first",stage="queue"}',
        'sana_errors_total{code="unknown_parameter"}',
    )
    before = [value(name) for name in names]
    client.post(GENERATIONS, json={"prompt": "a", "n": 3})
    client.post(GENERATIONS, json={"prompt": "a", "x": 3})
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [3, 0.5, 1]
    assert [value(f"sana_queue_{name}") for name in ("waiting", "running", "places", "ready")] == [3, 2, 64, 0]


def test_the_description_has_this_servers_models_and_limits(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"][GENERATIONS]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["model"]["anyOf"][0]["enum"] == ["first", "second"]
    assert (fields["prompt"]["maxLength"], fields["n"]["anyOf"][0]["maximum"]) == (50, 4)
    assert {"400", "401", "404", "408", "413", "415", "429", "500", "503", "504", "507"} <= set(operation["responses"])
    page = client.get("/docs")
    assert all(f"<code>{name}</code>" in page.text for name in fields)
    assert not re.search(r"<script|https?:", page.text)


def test_url_files_expire_and_a_full_disk_is_said(engine: StandInEngine, tmp_path: Path) -> None:
    config = replace(CONFIG, url_folder=tmp_path, url_seconds=0.3, url_bytes=3 * len(PNG))
    with running(engine, config) as address, httpx.Client(base_url=address) as client:

        def ask() -> httpx.Response:
            return client.post(GENERATIONS, json={"prompt": "a", "response_format": "url", "seed": 1})

        first = ask().json()["data"][0]["url"]
        assert client.get(first).status_code == 200
        while (full := ask()).status_code == 200:
            pass
        checked_error(full, 507, "disk_full")
        wait_for(lambda: client.get(first).status_code == 404 and not list(tmp_path.glob("*/*")))
        [folder] = tmp_path.iterdir()
        folder.rmdir()
        checked_error(ask(), 507, "disk_full")
        assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 200
    assert list(tmp_path.iterdir()) == []
