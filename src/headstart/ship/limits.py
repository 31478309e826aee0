"""How much a stranger may ask of the server at once, and how they are told no."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from headstart.errors import HeadstartError

MIB = 2**20


class Refused(HeadstartError):
    """A request that is not answered: a status of HTTP, and a sentence for the one who asked.

    Attributes:
        status: 4xx.
        headers: what else belongs to the answer, such as when to come again.
        details: fields of the answer beside `error`.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        *,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = dict(headers or {})
        self.details = dict(details or {})


@dataclass(frozen=True)
class Limits:
    """What one request, and what all together may cost.

    The defaults let a phone's pictures through (50 million pixels, 32 MB a request), 200 clients at once, and
    hold what waits in memory below 256 MB of files. A giant picture is decoded alone (`data.picture`).
    """

    request_bytes: int = 32 * MIB  # the body of one request, all its pictures together
    pixels: int = 50_000_000  # one picture; read off its header, before it is decoded
    files: int = 32  # pictures of one request
    requests: int = 256  # being answered at once, their bodies having arrived
    connections: int = 512  # open at once, idle ones included
    waiting_bytes: int = 256 * MIB  # bodies in memory, of all requests together
    head_seconds: float = 10.0  # for the first line and the headers to arrive
    seconds: float = 30.0  # for the body to arrive, and again for the answer to be made


@dataclass
class Room:
    """What all requests share: so many being answered, so many bytes waiting."""

    limits: Limits
    requests: int = 0
    waiting: int = field(default=0)  # bytes

    @contextmanager
    def seat(self) -> Iterator[None]:
        """A place among the requests that are being answered.

        Raises:
            Refused: all are taken.
        """
        if self.requests >= self.limits.requests:
            raise busy(f"{self.requests} requests are being answered")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def keep(self, size: int) -> None:
        """Count bytes that arrived; `drop` them when they are no longer held.

        Raises:
            Refused: too many are waiting already.
        """
        if self.waiting + size > self.limits.waiting_bytes:
            raise busy(f"{self.waiting // MIB} MB of pictures are waiting")
        self.waiting += size

    def drop(self, size: int) -> None:
        """Bytes that are no longer held."""
        self.waiting -= size


def busy(why: str) -> Refused:
    """429: it is not the fault of this request, and it may come again."""
    return Refused(429, f"Too busy: {why}. Try again in a moment.", headers={"Retry-After": "1"})
