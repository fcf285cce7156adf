"""The body of a form with files (multipart/form-data), read strictly: each name once, texts in UTF-8, few parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sana_export.serve.errors import Refusal

#: Parts of a form. The API has fewer fields.
MOST_PARTS = 64


@dataclass(frozen=True)
class FormField:
    """One field of a form."""

    name: str
    content: bytes = field(repr=False)
    #: Whether it is a file.
    is_file: bool

    @property
    def text(self) -> str:
        """Raises Refusal unless it is text in UTF-8."""
        try:
            return self.content.decode()
        except UnicodeDecodeError as error:
            raise Refusal("invalid_multipart", f"{self.name} is not text in UTF-8", param=self.name) from error


def parse_form(content_type: str, body: bytes) -> dict[str, FormField]:
    """The fields of a form by name. "image[]", as clients name the items of a list, is "image".

    Raises Refusal for a form that is damaged or incomplete, has a field twice, or too many.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary or not boundary.isascii():
        raise Refusal("invalid_multipart", "the content type multipart/form-data has no boundary")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refusal("invalid_multipart", f"the form is damaged: {error}") from error
    if not reader.ended:
        raise Refusal("invalid_multipart", "the form is damaged: its end is missing")
    fields: dict[str, FormField] = {}
    for headers, content in reader.parts:
        disposition, options = parse_options_header(headers.get(b"content-disposition", b"").decode("latin-1"))
        name = options.get(b"name", b"").decode(errors="replace").removesuffix("[]")
        if disposition != b"form-data" or not name:
            raise Refusal("invalid_multipart", "a part of the form has no name")
        if name in fields:
            raise Refusal("invalid_multipart", f"{name[:100]} is repeated; this server takes one", param=name[:100])
        fields[name] = FormField(name, bytes(content), b"filename" in options)
    return fields


class _Reader:
    """Collects the parts of a form: their headers by name in lower case, and their contents."""

    def __init__(self) -> None:
        self.parts: list[tuple[dict[bytes, bytes], bytearray]] = []
        self.ended = False
        self._name, self._value = bytearray(), bytearray()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self.parts[-1][1].extend(data[start:end]),
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) == MOST_PARTS:
            raise Refusal("invalid_multipart", f"the form has more than {MOST_PARTS} fields")
        self.parts.append(({}, bytearray()))

    def _header(self) -> None:
        self.parts[-1][0][bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        self.ended = True
