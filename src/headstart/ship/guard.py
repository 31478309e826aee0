"""What every request passes first, the host it names and its key; and what every answer carries."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.ship.journal import Journal
from headstart.ship.limits import Refused

OPEN = ("/", "/health", "/ready", "/openapi.json")  # no key: nothing of the model is said there
ASSETS = "/page/"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

# The page runs its own script and style, shows pictures it was given, and talks to its own server.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """The outermost part of the application.

    Args:
        app: what answers.
        journal: where it is written down.
        key: the key that clients have to send; None: none.
        hosts: names that the Host header may have; None: any. A page of somebody else's can make a browser
            send requests to this machine under a name of its own (DNS rebinding); this is what stops it.
    """

    def __init__(
        self, app: ASGIApp, *, journal: Journal, key: str | None = None, hosts: Collection[str] | None = None
    ) -> None:
        self.app, self.journal = app, journal
        self._key = None if key is None else _digest(key)
        self._hosts = None if hosts is None else {name.casefold().strip("[]") for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        noted: dict[str, Any] = scope.setdefault("state", {}).setdefault("noted", {})
        status = 499  # the client left before there was an answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _dress(MutableHeaders(scope=message), scope["path"], name)
            await send(message)

        self.journal.current.inc()
        try:
            self._check(scope["path"], headers)
            await self.app(scope, receive, answer)
        except Refused as refusal:
            await refuse(refusal, answer)
        finally:
            self.journal.current.dec()
            route = getattr(scope.get("route"), "path", "(none)")
            method = scope["method"] if scope["method"] in METHODS else "(other)"
            self.journal.request(
                method=method,
                route=route,
                status=status,
                seconds=time.perf_counter() - began,
                id=name,
                client=(scope.get("client") or ("",))[0],
                **noted,
            )

    def _check(self, path: str, headers: Headers) -> None:
        if self._hosts is not None and "host" in headers:
            host = _hostname(headers["host"])
            if host not in self._hosts:
                raise Refused(
                    421,
                    "This server does not answer to the name in the Host header. "
                    "Whoever runs it can add the name with --allow-host.",
                )
        if self._key is not None and path not in OPEN and not path.startswith(ASSETS):
            given = _given_key(headers)
            if given is None:
                raise Refused(
                    401,
                    "A key is needed: send the header 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if not hmac.compare_digest(_digest(given), self._key):
                raise Refused(401, "This key is not the right one.", headers={"WWW-Authenticate": "Bearer"})


async def refuse(refusal: Refused, send: Send) -> None:
    """A refusal as an answer: `{"error": sentence}`."""
    body = json.dumps({"error": str(refusal), **refusal.details}, ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.lower(): value for name, value in refusal.headers.items()},
    }
    raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _digest(key: str) -> bytes:
    # Of equal length whatever is given, so that comparing takes the same time.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _given_key(headers: Headers) -> str | None:
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.casefold() == "bearer" and bearer.strip():
        return bearer.strip()
    return headers.get("x-api-key") or None


def _hostname(host: str) -> str:
    """'[::1]:8000' -> '::1', 'LOCALHOST:80' -> 'localhost'."""
    host = host.strip().casefold()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if re.search(r":\d*$", host) else host


def _dress(headers: MutableHeaders, path: str, name: str) -> None:
    """The headers that every answer has."""
    page = path == "/" or path.startswith(ASSETS)
    headers["X-Request-ID"] = name
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Content-Security-Policy"] = PAGE_POLICY if page else _API_POLICY
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    headers["Permissions-Policy"] = "camera=(self), microphone=(), geolocation=()"
    headers.setdefault("Cache-Control", "no-cache" if page else "no-store")
