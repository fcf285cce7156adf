"""Errors as clients see them: OpenAI's form, with a status. Paths and commands of the server stay in its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sana_export.errors import ArtifactError, Cancelled, DependencyError, SanaExportError, UsageError

#: The status and OpenAI's `type` by code.
CODES: Mapping[str, tuple[int, str]] = {
    "invalid_value": (400, "invalid_request_error"),
    "unknown_parameter": (400, "invalid_request_error"),
    "missing_required_parameter": (400, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "invalid_multipart": (400, "invalid_request_error"),
    "invalid_http": (400, "invalid_request_error"),
    "invalid_image": (400, "invalid_request_error"),
    "content_policy_violation": (400, "image_generation_user_error"),
    "invalid_api_key": (401, "authentication_error"),
    "forbidden_origin": (403, "permission_error"),
    "not_found": (404, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "body_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "misdirected": (421, "invalid_request_error"),
    "queue_full": (429, "rate_limit_error"),
    "headers_too_large": (431, "invalid_request_error"),
    "client_closed": (499, "invalid_request_error"),
    "internal_error": (500, "server_error"),
    "model_damaged": (500, "server_error"),
    "out_of_resources": (503, "server_error"),
    "too_many_connections": (503, "server_error"),
    "shutting_down": (503, "server_error"),
    "not_ready": (503, "server_error"),
    "timeout": (504, "server_error"),
    "disk_full": (507, "server_error"),
}
#: Fields of a body that an error of the runtime begins with.
PARAMETERS = frozenset(
    {"prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "pag_scale", "scheduler", "strength", "seed"}
)
#: Seconds after which a client may try again, by code.
RETRY_AFTER = {"queue_full": 1, "out_of_resources": 5, "too_many_connections": 1, "shutting_down": 5, "not_ready": 5}


class Refusal(SanaExportError):
    """A request that gets an error with one of `CODES`. Its text is for the client. It can be pickled."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.param = code, param
        self.retry_after = RETRY_AFTER.get(code) if retry_after is None else retry_after
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _refusal, (self.code, self.message, self.param, self.retry_after, self.headers)


def _refusal(code: str, message: str, param: str | None, retry_after: float | None, headers: Mapping[str, str]) -> Refusal:
    return Refusal(code, message, param=param, retry_after=retry_after, headers=headers)


@dataclass(frozen=True)
class ErrorAnswer:
    """What a client gets in place of an image."""

    status: int
    #: {"error": {"message", "type", "param", "code"}}.
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The key in `CODES`."""
        return str(self.body["error"]["code"])


def answer(error: BaseException, model: str | None = None) -> ErrorAnswer:
    """What a client gets for `error` of a request for `model`. It has no path, command or traceback of the server."""
    refusal = error if isinstance(error, Refusal) else _as_refusal(error, model or "?")
    status, kind = CODES[refusal.code]
    body = {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}
    retry = {} if refusal.retry_after is None else {"Retry-After": str(max(1, round(refusal.retry_after)))}
    return ErrorAnswer(status, body, {**retry, **refusal.headers})


def usage_refusal(error: UsageError, hidden: Mapping[str, str] | None = None) -> Refusal:
    """A wrong request as a client sees it, without the command that fixes it on the server.

    hidden: paths of the server that may be in the error's texts, and what to write in place of each.
    """
    shown = (("found", error.found), ("wanted", error.wanted))
    text = "; ".join([error.message, *(f"{name}: {value}" for name, value in shown if value is not None)])
    for path, name in (hidden or {}).items():
        text = text.replace(path, name)
    first = error.message.partition(" ")[0]
    return Refusal("invalid_value", text, param=first if first in PARAMETERS else None)


def _as_refusal(error: BaseException, model: str) -> Refusal:
    if isinstance(error, UsageError):
        return usage_refusal(error)
    if isinstance(error, Cancelled):
        return Refusal("client_closed", "the request was cancelled")
    if isinstance(error, ArtifactError):
        return Refusal("model_damaged", f"the model {model!r} is damaged or drew no finite image; the server's log has the cause")
    if isinstance(error, DependencyError):
        return Refusal("out_of_resources", f"the server has too few resources to draw with {model!r} now; try again later")
    return Refusal("internal_error", "the server failed to draw the image; its log has the cause")
