"""The service: what is answered at which address. Knows no socket (`listening`) and no page (`page/`).

POST /predict       pictures -> labels with calibrated probabilities, `unsure` below the threshold
GET  /labels        the classes
GET  /card          what is known of the model, and what may be asked of this server
GET  /health        the process lives            GET /ready     it answers
GET  /metrics       numbers for Prometheus       GET /openapi.json
GET  /              the page for people
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import headstart
from headstart.data.picture import Unreadable
from headstart.ship import folder as files
from headstart.ship.batching import Batcher
from headstart.ship.guard import Guard
from headstart.ship.intake import Upload, prepared, uploads
from headstart.ship.journal import LOGGER, Journal
from headstart.ship.limits import MIB, Limits, Refused, Room, busy
from headstart.ship.predict import Prediction, Predictor

_INLINE = 256 * 1024  # bytes; parsing a larger body would hold up everybody else


class Best(BaseModel):
    """A label and its probability."""

    label: str
    probability: float = Field(ge=0, le=1, description="calibrated, where the model was")


class Row(BaseModel):
    """What the network says of one picture, or why it says nothing."""

    name: str | None = Field(description="the file's name, as it was sent")
    label: str | None = Field(description="the most probable label")
    probability: float | None = Field(ge=0, le=1, description="of that label")
    unsure: bool = Field(description="below the model's threshold: ask a human")
    best: list[Best] = Field(description="the most probable labels, most probable first")
    error: str | None = Field(description="why there is no label")


class Answer(BaseModel):
    """A row per picture, in the order they were sent."""

    predictions: list[Row]


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="a sentence for people")
    predictions: list[Row] | None = Field(None, description="where several were sent and none is one")


class Labels(BaseModel):
    """The classes, in the order of the network's outputs."""

    labels: list[str]


class State(BaseModel):
    """Whether it works."""

    status: str


class Card(BaseModel):
    """What is known of the model, and what may be asked of this server."""

    headstart: str = Field(description="version")
    classes: int
    calibration: dict[str, Any] = Field(
        description="temperature; threshold below which a prediction is unsure (0: none is, null: all are); "
        "the accuracy wanted of the others; what became of it on val and test"
    )
    card: dict[str, Any] = Field(description="how it was made, and how good it is")
    readme: str | None = Field(description="the bundle's README.md")
    limits: dict[str, float] = Field(description="of one request")


class Service:
    """A model and all that answers need: threads that decode, the batches, the room, the numbers.

    Args:
        model: what is served.
        limits: what may be asked of it.
        batch_size: pictures per forward pass.
        patience: seconds that a batch waits for pictures that are being decoded.
    """

    def __init__(
        self, model: Predictor, *, limits: Limits, batch_size: int = 16, patience: float = 0.002
    ) -> None:
        self.model, self.limits = model, limits
        self.room = Room(limits)
        self.journal = Journal(model.classes)
        self.batcher: Batcher[Prediction] = Batcher(
            model.judge, most=batch_size, patience=patience, told=self.journal.batch
        )
        self.stopping = False
        self._decoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    async def start(self) -> None:
        """Be ready: the first picture should take as long as the next."""
        self.batcher.start()
        blank = self.model.prepare(Image.new("RGB", (64, 64)))
        await asyncio.gather(*[self.batcher.ask(blank) for _ in range(self.batcher.most)])

    async def stop(self) -> None:
        """Answer nothing more."""
        self.stopping = True
        await self.batcher.stop()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def predict(self, request: Request, top: int) -> tuple[int, dict[str, Any]]:
        """The status and the document that answer a request for predictions.

        Raises:
            Refused: there is no picture in it, too much of it, or no room for it.
        """
        noted = request.state.noted
        held = _Held(self.room)
        try:
            body = await self._body(request, held)
            noted["bytes"] = len(body)
            with self.room.seat():
                try:
                    async with asyncio.timeout(self.limits.seconds):
                        found = await self._uploads(request.headers.get("content-type"), body)
                        del body
                        noted["pictures"] = len(found)
                        rows = await self._rows(found, top)
                except TimeoutError:
                    raise busy(f"no answer within {self.limits.seconds:g} s") from None
        finally:
            held.drop()
        bad = [row for row in rows if row["error"] is not None]
        noted["unreadable"] = len(bad)
        if len(bad) < len(rows):
            return 200, {"predictions": rows}
        first = f"{rows[0]['name'] or 'The picture'}: {rows[0]['error']}."
        if len(rows) == 1:
            return 422, {"error": first}
        return 422, {"error": f"None of the {len(rows)} pictures can be read. {first}", "predictions": rows}

    async def _body(self, request: Request, held: _Held) -> bytes:
        most = self.limits.request_bytes
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > most:
            raise _too_long(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > most:
                        raise _too_long(most)
                    held.keep(len(chunk))
                    body += chunk
        except TimeoutError:
            raise Refused(
                408, f"The body did not arrive within {self.limits.seconds:g} s; {len(body)} bytes of it did."
            ) from None
        return bytes(body)

    async def _uploads(self, kind: str | None, body: bytes) -> list[Upload]:
        if len(body) <= _INLINE:
            return uploads(kind, body, self.limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, uploads, kind, body, self.limits)

    async def _rows(self, found: list[Upload], top: int) -> list[dict[str, Any]]:
        if len(found) == 1:  # no task of its own
            return [await self._row(found[0], top)]
        return list(await asyncio.gather(*[self._row(upload, top) for upload in found]))

    async def _row(self, upload: Upload, top: int) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        try:
            with self.batcher.coming():
                pixels = await loop.run_in_executor(self._decoders, self._decode, upload)
                asked = self.batcher.ask(pixels)
        except Unreadable as error:
            self.journal.unreadable.inc()
            return _row(upload.name, error=error.reason)
        said = await asked
        assert said.label is not None
        self.journal.prediction(said.label, said.unsure)
        best = list(said.probabilities.items())[:top]
        return _row(upload.name, said=said, best=best)

    def _decode(self, upload: Upload) -> np.ndarray:
        began = time.perf_counter()
        try:
            return prepared(upload, self.model.prepare, self.limits)
        finally:
            self.journal.decoding.observe(time.perf_counter() - began)

    def card(self) -> dict[str, Any]:
        """What `GET /card` says."""
        calibration = {k: v for k, v in self.model.calibration.to_dict().items() if k != "risk_coverage"}
        folder = self.model.folder
        readme = None if folder is None else folder / files.CARD
        return {
            "headstart": headstart.__version__,
            "classes": len(self.model.classes),
            "calibration": calibration,
            "card": self.model.card,
            "readme": _text(readme),
            "limits": {
                "bytes": self.limits.request_bytes,
                "pixels": self.limits.pixels,
                "files": self.limits.files,
                "seconds": self.limits.seconds,
            },
        }


def application(
    model: Predictor,
    *,
    limits: Limits | None = None,
    key: str | None = None,
    hosts: Collection[str] | None = None,
    batch_size: int = 16,
    patience: float = 0.002,
) -> FastAPI:
    """The ASGI application that serves a model.

    Args:
        model: as `headstart.load` gives it.
        limits: what may be asked of it; None: the defaults.
        key: what clients have to send; None: nothing.
        hosts: names it answers to; None: any.
        batch_size: pictures per forward pass.
        patience: seconds that a batch waits for pictures that are being decoded.
    """
    service = Service(model, limits=limits or Limits(), batch_size=batch_size, patience=patience)

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="headstart",
        version=headstart.__version__,
        description=f"Labels pictures with one of {len(model.classes)} classes.",
        docs_url=None,  # it would load its scripts from elsewhere
        redoc_url=None,
        lifespan=living,
        routes=[
            Route("/", _index, methods=["GET"]),
            Mount("/page", StaticFiles(packages=[("headstart.ship", "page")])),
        ],
    )
    app.state.service = service
    app.add_middleware(Guard, journal=service.journal, key=key, hosts=hosts)
    _answer_in_sentences(app)
    _routes(app, service, keyed=key is not None)
    return app


def _routes(app: FastAPI, service: Service, *, keyed: bool) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        421: {"model": Problem, "description": "Not this server's name."}
    }
    if keyed:
        refusals[401] = {"model": Problem, "description": "No key, or not the right one."}
    security: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}] if keyed else []
    extra: dict[str, Any] = {"security": security} if keyed else {}

    @app.post(
        "/predict",
        response_model=Answer,
        summary="Label pictures",
        description="Send one picture as it is, several in a form, or base64 in JSON. Where at least one of "
        "them is a picture, those that are not have their reason in `error` of their row.",
        responses={
            **refusals,
            400: {"model": Problem, "description": "Not what its Content-Type says, or no HTTP."},
            408: {"model": Problem, "description": "It did not arrive in time."},
            413: {"model": Problem, "description": "Too many bytes or pictures."},
            415: {"model": Problem, "description": "A Content-Type that is not taken."},
            422: {"model": Problem, "description": "None of it is a picture that can be read."},
            429: {"model": Problem, "description": "Too busy; try again."},
        },
        openapi_extra={**extra, "requestBody": _BODY},
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=100_000, description="labels in `best`")] = 5,
    ) -> Response:
        status, document = await service.predict(request, top)
        return JSONResponse(document, status)

    @app.get("/labels", response_model=Labels, responses=refusals, openapi_extra=extra, summary="The classes")
    async def labels() -> Response:
        return JSONResponse({"labels": service.model.classes})

    @app.get("/card", response_model=Card, responses=refusals, openapi_extra=extra, summary="The model card")
    async def card() -> Response:
        return JSONResponse(_plain(service.card()))

    @app.get("/health", response_model=State, summary="The process lives", responses={421: refusals[421]})
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get(
        "/ready",
        response_model=State,
        summary="It answers",
        responses={421: refusals[421], 503: {"model": State, "description": "Stopping, or stuck."}},
    )
    async def ready() -> Response:
        if service.stopping or service.batcher.stuck(service.limits.seconds):
            return JSONResponse({"status": "stopping" if service.stopping else "stuck"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get(
        "/metrics",
        responses={**refusals, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
        openapi_extra=extra,
        summary="Numbers for Prometheus",
    )
    async def metrics() -> Response:
        return Response(
            service.journal.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    if keyed:
        _describe_key(app)


def _answer_in_sentences(app: FastAPI) -> None:
    """Every answer that is no answer has `error`, a sentence."""

    @app.exception_handler(Refused)
    async def refused(request: Request, refusal: Refused) -> Response:
        return JSONResponse(
            {"error": str(refusal), **refusal.details}, refusal.status, headers=dict(refusal.headers)
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}."}, 422)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        sentence = {
            404: "There is nothing at this address. See /openapi.json for what there is.",
            405: "This address does not take this method. See /openapi.json for what it takes.",
        }.get(error.status_code, f"{error.detail}.")
        return JSONResponse({"error": sentence}, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; the log does

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        LOGGER.error("bug", exc_info=error)
        return JSONResponse({"error": "A mistake of the server's; it is in its log."}, 500)


def _describe_key(app: FastAPI) -> None:
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _index(request: Request) -> Response:
    page = resources.files("headstart.ship") / "page" / "index.html"
    return Response(page.read_bytes(), media_type="text/html")


class _Held:
    """Bytes of one request that count against the room."""

    def __init__(self, room: Room) -> None:
        self._room, self._size = room, 0

    def keep(self, size: int) -> None:
        self._room.keep(size)
        self._size += size

    def drop(self) -> None:
        self._room.drop(self._size)
        self._size = 0


def _row(
    name: str | None,
    *,
    said: Prediction | None = None,
    best: list[tuple[str, float]] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "label": None if said is None else said.label,
        "probability": None if said is None or said.probability is None else min(1.0, said.probability),
        "unsure": said is not None and said.unsure,
        "best": [{"label": label, "probability": min(1.0, share)} for label, share in best or []],
        "error": error,
    }


def _text(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _too_long(most: int) -> Refused:
    return Refused(413, f"The body is too long: at most {most / MIB:g} MB are taken in one request.")


def _plain(value: Any) -> Any:
    """Without what JSON has no word for: a metric that could not be computed is null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BASE64 = {"type": "string", "contentEncoding": "base64", "description": "base64, or a data URL"}
_ITEM = {
    "oneOf": [
        _BASE64,
        {
            "type": "object",
            "required": ["data"],
            "additionalProperties": False,
            "properties": {"data": _BASE64, "name": {"type": ["string", "null"]}},
        },
    ]
}
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["files"],
                "properties": {
                    "files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        "application/json": {
            "schema": {
                "oneOf": [
                    {
                        "type": "object",
                        "required": ["image"],
                        "additionalProperties": False,
                        "properties": {"image": _ITEM},
                    },
                    {
                        "type": "object",
                        "required": ["images"],
                        "additionalProperties": False,
                        "properties": {"images": {"type": "array", "minItems": 1, "items": _ITEM}},
                    },
                ]
            }
        },
        "application/octet-stream": _BINARY,
        "image/jpeg": _BINARY,
        "image/png": _BINARY,
        "image/webp": _BINARY,
    },
}
