"""From the body of a request to pictures: a form, the bytes themselves, or base64 in JSON.

Nothing is written to a disk, names are only ever echoed, and what a picture claims in its header is checked
before it is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from headstart.data.picture import open_with_notes
from headstart.errors import nearest
from headstart.ship.limits import Limits, Refused

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# Formats whose decoders read nothing but the file: no PostScript, nothing that is drawn or looked up.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
TAKEN = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or PPM"

_NAME = 120  # characters of a name that are echoed
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_KEYS = ("image", "images")
_ITEM_KEYS = ("data", "name")

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Upload:
    """One picture as it came."""

    name: str | None  # for people to recognise it; never a path
    content: bytes


def uploads(content_type: str | None, body: bytes, limits: Limits) -> list[Upload]:
    """The pictures in a request's body.

    Args:
        content_type: the header; None or an unknown one: the body is one picture.
        body: all of it.
        limits: how many pictures there may be.

    Raises:
        Refused: 400 or 422, with what is wrong with it.
    """
    if not body:
        raise Refused(400, f"The body is empty. Send a picture: {TAKEN}, as it is, in a form, or in JSON.")
    try:
        kind, options = parse_options_header(content_type)
    except (ValueError, IndexError) as error:
        raise Refused(400, "The Content-Type header cannot be read.") from error
    if kind == b"multipart/form-data":
        found = _form(options.get(b"boundary"), body, limits)
    elif kind == b"application/json" or kind.endswith(b"+json"):
        found = _json(body)
    elif kind == b"application/x-www-form-urlencoded":
        # What curl -d and --data-binary send unless told: bytes of a picture are let through.
        found = [Upload(None, body)]
    elif kind.startswith((b"image/", b"application/octet-stream")) or not kind:
        found = [Upload(None, body)]
    else:
        shown = kind.decode("latin-1")[:_NAME]
        raise Refused(
            415,
            f"A body of the type '{_printable(shown)}' is not taken. Send multipart/form-data, "
            "application/json, or the picture itself as image/jpeg or application/octet-stream.",
        )
    if not found:
        raise Refused(422, "There is no picture in the body.")
    if len(found) > limits.files:
        raise _too_many(limits)
    return found


def prepared(upload: Upload, prepare: Callable[[Image.Image], Prepared], limits: Limits) -> Prepared:
    """Decode a picture within the limits, and make of it what the network takes.

    Raises:
        Unreadable: with the reason, in a few words.
    """
    stream = _Timed(upload.content, limits.seconds)
    picture, _ = open_with_notes(stream, upload.name or "picture", formats=FORMATS, most_pixels=limits.pixels)
    return prepare(picture)


def shown(name: str | None) -> str | None:
    """A file's name for people: without folders and control characters, and not too long."""
    if name is None:
        return None
    last = re.split(r"[/\\]", name)[-1].strip()
    last = _printable(last)
    return last if len(last) <= _NAME else f"{last[: _NAME - 1]}…"


class _Timed(io.BytesIO):
    """Bytes that give out after a while: a small file can ask for hours of decoding."""

    def __init__(self, content: bytes, seconds: float) -> None:
        super().__init__(content)
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"took longer than {self._seconds:g} s to decode")
        return super().read(size)


def _printable(text: str) -> str:
    """Text that any encoding and terminal takes: no control characters, no halves of surrogate pairs."""
    return _CONTROL.sub("", text.encode("utf-8", "replace").decode("utf-8"))


def _too_many(limits: Limits) -> Refused:
    most = f"{limits.files} picture" + ("" if limits.files == 1 else "s")
    return Refused(413, f"At most {most} are taken in one request. Send the rest in another.")


class _Form:
    """Collects the files of a multipart body, as the parser calls back."""

    def __init__(self, limits: Limits) -> None:
        self.files: list[Upload] = []
        self._limits = limits
        self._field, self._value, self._content = bytearray(), bytearray(), bytearray()
        self._name: str | None = None
        self.ended = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._headers,
            "on_part_data": lambda data, start, end: self._content.extend(memoryview(data)[start:end]),
            "on_part_end": self._end,
            "on_end": self._done,
        }

    def _begin(self) -> None:
        if len(self.files) >= self._limits.files:
            raise _too_many(self._limits)
        self._disposition: bytes | None = None
        self._content = bytearray()

    def _header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" not in options:
            field = _printable(options.get(b"name", b"").decode("utf-8", "replace"))[:_NAME]
            raise Refused(
                422,
                f"The part '{field}' of the form is no file. Send pictures as files, as in "
                "'curl -F files=@photo.jpg'.",
            )
        self._name = options[b"filename"].decode("utf-8", "replace")

    def _end(self) -> None:
        self.files.append(Upload(shown(self._name), bytes(self._content)))
        self._content = bytearray()

    def _done(self) -> None:
        self.ended = True


def _form(boundary: bytes | None, body: bytes, limits: Limits) -> list[Upload]:
    if not boundary:
        raise Refused(400, "The Content-Type header of the form names no boundary.")
    form = _Form(limits)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError, IndexError) as error:
        raise Refused(400, "The form is broken: its parts do not follow multipart/form-data.") from error
    if not form.ended:
        raise Refused(400, "The form is cut off: its last boundary is missing.")
    return form.files


def _json(body: bytes) -> list[Upload]:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The body is not valid JSON.") from error
    if not isinstance(value, dict):
        raise Refused(422, 'A JSON object is expected: {"image": BASE64} or {"images": [BASE64, ...]}.')
    _known(value, _KEYS, "The JSON")
    if len(value) != 1:
        raise Refused(422, 'Give exactly one of "image" and "images".')
    if "image" in value:
        return [_encoded(value["image"], '"image"')]
    if not isinstance(value["images"], list):
        raise Refused(422, '"images" is a list of pictures in base64.')
    return [_encoded(each, f'"images"[{index}]') for index, each in enumerate(value["images"])]


def _encoded(value: Any, where: str) -> Upload:
    """A picture in base64: the text, a data URL, or {"data": ..., "name": ...}."""
    name: Any = None
    if isinstance(value, dict):
        _known(value, _ITEM_KEYS, where)
        name, value = value.get("name"), value.get("data")
        if name is not None and not isinstance(name, str):
            raise Refused(422, f"The name in {where} is a text.")
    if not isinstance(value, str):
        raise Refused(422, f'{where} is a picture in base64, or {{"data": BASE64, "name": TEXT}}.')
    if value.startswith("data:"):
        head, comma, value = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Refused(422, f"{where} is a data URL without base64.")
    try:
        content = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(422, f"{where} is not valid base64.") from error
    return Upload(shown(name), content)


def _known(value: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in allowed:
            guess = nearest(key, allowed)
            hint = f"Did you mean '{guess}'?" if guess else f"Allowed: {', '.join(allowed)}."
            raise Refused(422, f"{where} has an unknown key '{_printable(key)[:_NAME]}'. {hint}")
