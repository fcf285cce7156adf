"""The description of the API: what OpenAPI cannot take from the routes, and a page that shows it without foreign scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sana_export.runtime.scheduler_choice import NAMES
from sana_export.serve.config import ServeConfig
from sana_export.serve.engine import ModelCard
from sana_export.serve.errors import CODES
from sana_export.serve.schema import EditFields, ErrorBody, Fields, GenerationBody

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;vertical-align:top;padding:.3em .6em;border-bottom:1px solid #ccc}"
    "code{background:#eee;padding:0 .2em}"
)
#: The headers of the page: its own style is the only thing that it may load.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
}
_FILE = {"type": "string", "format": "binary"}


def error_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """What FastAPI's `responses` says about errors with these codes."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        entry = found.setdefault(CODES[code][0], {"model": ErrorBody, "description": ""})
        entry["description"] = ", ".join(filter(None, (entry["description"], code)))
    return found


def generation_body(config: ServeConfig, models: Sequence[ModelCard]) -> dict[str, Any]:
    """`requestBody` of POST /v1/images/generations."""
    return {"required": True, "content": {"application/json": {"schema": _limited(GenerationBody, config, models)}}}


def edit_body(config: ServeConfig, models: Sequence[ModelCard]) -> dict[str, Any]:
    """`requestBody` of POST /v1/images/edits."""
    schema = _limited(EditFields, config, models)
    for name, described in schema["properties"].items():  # the texts of a form: none of them is null
        if "anyOf" in described:
            own, _null = described.pop("anyOf")
            schema["properties"][name] = {**own, **{key: value for key, value in described.items() if value is not None}}
    schema["properties"] |= {
        "image": {**_FILE, "description": "The image to start from: a PNG, JPEG or WebP file, or a data URL."},
        "mask": {**_FILE, "description": "Transparent, or without an alpha channel white, where the image is drawn anew."},
    }
    schema["required"] = [*schema["required"], "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _limited(kind: type[Fields], config: ServeConfig, models: Sequence[ModelCard]) -> dict[str, Any]:
    """The schema of a body, with this server's models and limits."""
    schema = kind.model_json_schema()
    limits = config.limits
    own: Mapping[str, dict[str, Any]] = {
        "prompt": {"maxLength": limits.prompt_characters},
        "negative_prompt": {"maxLength": limits.prompt_characters},
        "n": {"maximum": limits.images},
        "num_inference_steps": {"maximum": limits.steps},
        "model": {"enum": [card.name for card in models]},
        "scheduler": {"enum": list(NAMES)},
    }
    for name, settings in own.items():
        described = schema["properties"][name]
        described.get("anyOf", [described])[0].update(settings)
    return schema


def page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as a page of HTML."""
    parts = [f"<h1>{escape(document['info']['title'])}</h1><p><a href='/openapi.json'>openapi.json</a></p>"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>")
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<p>{escape(kind)}</p>{_fields(content['schema'])}")
            rows = "".join(
                f"<tr><td>{escape(str(status))}</td><td>{escape(response['description'])}</td></tr>"
                for status, response in operation["responses"].items()
            )
            parts.append(f"<table><tr><th>Status</th><th>Meaning</th></tr>{rows}</table>")
    return f"<!doctype html><meta charset='utf-8'><title>API</title><style>{_STYLE}</style>{''.join(parts)}"


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}</td>"
        f"<td>{escape(_kind(field))}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table><tr><th>Field</th><th>Values</th><th>Meaning</th></tr>{rows}</table>"


def _kind(field: Mapping[str, Any]) -> str:
    """The type of a field with its limits, in words."""
    own = field.get("anyOf", [field])[0]
    if "enum" in own:
        return ", ".join(map(str, own["enum"]))
    limits = ((word, own[key]) for key, word in _LIMITS.items() if key in own)
    return " ".join([own.get("const", own.get("type", "")), *(f"{word} {value}" for word, value in limits)])


_LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "maxLength": "up to characters:"}
