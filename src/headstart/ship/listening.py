"""The sockets of the server: uvicorn, with deadlines for clients that send or read too slowly, and workers.

uvicorn waits for ever for the rest of a request's head, for a body that nobody reads any more, and for a
client that does not fetch its answer. `Patient` gives each of these a deadline; the body that somebody does
read has its own in `server`.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors import Multiprocess

from headstart.errors import ConfigError
from headstart.ship.journal import SHARED, log_to_stderr
from headstart.ship.limits import Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEAD_BYTES = 32 * 1024  # first line and headers; browsers stay below 16 KiB


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.casefold() == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; port 0 is any that is free.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    try:
        family, _, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"The host '{host}' is no address of this machine. Try 127.0.0.1.") from error
    # With its protocol named, asyncio turns Nagle's algorithm off; else each answer would take 40 ms longer.
    listening = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # Here, and not when the model is loaded: who is first is known at once.
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} of {host} is taken. Give another with --port, or --port 0 for any that is free."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"Port {port} may not be used without more rights; take one above 1023."
            ) from error
        raise ConfigError(f"'{host}' port {port} cannot be listened at: {error.strerror}.") from error
    listening.set_inheritable(True)
    return listening


def address_of(listening: socket.socket) -> str:
    """http://127.0.0.1:8000, as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True)
class Built:
    """An application that is already there."""

    app: Any

    def __call__(self) -> Any:
        """It."""
        return self.app


class Config(uvicorn.Config):
    """What uvicorn has to know, and our limits."""

    def __init__(self, build: Callable[[], Any], limits: Limits, *, workers: int = 1) -> None:
        super().__init__(
            build,
            factory=True,
            http=Patient,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the address in the log is the one that connected
            workers=workers,
            backlog=1024,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_keep_alive=max(1, round(limits.head_seconds)),
            timeout_graceful_shutdown=round(2 * limits.seconds) + 1,
            timeout_worker_healthcheck=60,
        )
        self.limits = limits

    def configure_logging(self) -> None:
        """As lines of JSON, in each worker too."""
        log_to_stderr()


def serve(
    build: Callable[[], Any],
    listening: Sequence[socket.socket],
    *,
    limits: Limits,
    workers: int = 1,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first.

    Args:
        build: makes the application; with several workers it is pickled, and called in each.
        listening: bound sockets.
        limits: deadlines and the number of connections, per worker.
        workers: processes.
        started: called when requests are answered (one worker), or about to be (several).
    """
    config = Config(build, limits, workers=workers)
    if workers == 1:
        server = _Server(config)
        server.told = started
        server.run(sockets=list(listening))
        return
    numbers = tempfile.mkdtemp(prefix="headstart-metrics-")
    os.environ[SHARED] = numbers
    try:
        started()
        Multiprocess(config, sockets=list(listening)).run()
    finally:
        del os.environ[SHARED]
        shutil.rmtree(numbers, ignore_errors=True)
        for each in listening:
            each.close()


class _Server(uvicorn.Server):
    """uvicorn's, which says when it has started, and ends well when it is told to stop."""

    told: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.told()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGINT and SIGTERM, and leave it at that: uvicorn would send itself the signal again."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


class Patient(H11Protocol):
    """One connection of HTTP/1.1, with deadlines."""

    config: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = (
            None  # runs while a request's head is awaited or rubbish read
        )
        self._reader: asyncio.TimerHandle | None = None  # runs while the client does not read
        self._began = False  # some of a head has arrived

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless too many have."""
        super().connection_made(transport)
        if len(self.connections) > self.config.limits.connections:
            self._say(429, "Too busy: too many connections are open. Try again in a moment.")
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all that waits."""
        super().connection_lost(exc)
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        self._began = True
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The next request may come, or what is left of this one."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._give_up_later()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        """No other request came."""
        super().timeout_keep_alive_handler()
        self._give_up_later()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        self._give_up_later()

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        if self._reader is not None and not self.transport.is_closing():
            self._reader.cancel()
            self._reader = None

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP/1.1: a sentence where one can still be sent."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whatever the application is about to say is too late
            self.cycle.message_event.set()
        if "Invalid HTTP" in msg:
            msg = (
                "This is not a valid HTTP/1.1 request, or its headers are longer than "
                f"{_HEAD_BYTES // 1024} KiB."
            )
        self._say(400, msg)

    def _watch(self) -> None:
        """Start or stop the deadline for what has to arrive next."""
        if self.transport.is_closing():
            return
        theirs, ours = self.conn.their_state, self.conn.our_state
        unread = theirs is h11.SEND_BODY and ours is h11.DONE  # the rest of a body that was refused
        if theirs is not h11.IDLE and not unread:
            self._began = False
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None and self.timeout_keep_alive_task is None:
            self._head = self.loop.call_later(self.config.limits.head_seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._head = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self._began:
            seconds = self.config.limits.head_seconds
            self._say(408, f"The headers of the request did not arrive within {seconds:g} s.")
        else:  # nothing was asked, or it was answered long ago
            self.transport.close()
            self._give_up_later()

    def _say(self, status: int, sentence: str) -> None:
        """A last answer from here, without the application."""
        with suppress(h11.LocalProtocolError):  # an answer is under way: there is room for no other
            body = json.dumps({"error": sentence}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body)):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
        self.transport.close()
        self._give_up_later()

    def _give_up_later(self) -> None:
        """Close for good, unless the client reads what it was sent."""
        if self._reader is None:
            self._reader = self.loop.call_later(self.config.limits.head_seconds, self.transport.abort)
