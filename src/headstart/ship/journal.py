"""What the server tells those who run it: a line of JSON per request, and numbers for Prometheus.

Neither holds a picture, a file's name, a key, or any other words of a client; the path is the route's own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

LOGGER = logging.getLogger("headstart.serve")
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where several workers put their numbers together
_LABELS = 1000  # classes that are counted one by one; more would swamp a Prometheus

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Lines(logging.Formatter):
    """A record as one line of JSON; what was given as `extra={"fields": {...}}` stands beside the event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "process": os.getpid(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the server's events, and uvicorn's warnings, to stderr as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name, least in ((LOGGER.name, level), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False


class Journal:
    """The numbers of one server.

    Args:
        classes: the labels, to count what was said.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._shared = SHARED in os.environ
        self.registry = registry = CollectorRegistry()
        if not self._shared:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        by_route = ["method", "route", "status"]
        self.requests = Counter(
            "headstart_requests", "Requests answered, refused ones included.", by_route, registry=registry
        )
        self.seconds = Histogram(
            "headstart_request_seconds",
            "From the request's headers to the last byte of the answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.current = Gauge(
            "headstart_requests_in_progress",
            "Requests being read or answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.decoding = Histogram(
            "headstart_decode_seconds", "Of one picture.", buckets=_SECONDS, registry=registry
        )
        self.inference = Histogram(
            "headstart_inference_seconds", "Of one batch.", buckets=_SECONDS, registry=registry
        )
        self.batches = Histogram(
            "headstart_batch_size", "Pictures in one forward pass.", buckets=_SIZES, registry=registry
        )
        self.predictions = Counter(
            "headstart_predictions",
            "Pictures labelled, by what they were called.",
            ["label"],
            registry=registry,
        )
        self.unsure = Counter("headstart_unsure", "Of these, below the threshold.", registry=registry)
        self.unreadable = Counter("headstart_unreadable", "Files that held no picture.", registry=registry)
        self._named = frozenset(classes[:_LABELS])
        if not self._shared:
            for label in classes[:_LABELS]:
                self.predictions.labels(label)  # shown as 0 before it is first said

    def batch(self, size: int, seconds: float) -> None:
        """One forward pass."""
        self.batches.observe(size)
        self.inference.observe(seconds)

    def prediction(self, label: str, unsure: bool) -> None:
        """One picture labelled."""
        self.predictions.labels(label if label in self._named else "(others)").inc()
        if unsure:
            self.unsure.inc()

    def request(self, *, method: str, route: str, status: int, seconds: float, **fields: Any) -> None:
        """One request ended."""
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        LOGGER.info(
            "request",
            extra={
                "fields": {
                    "method": method,
                    "route": route,
                    "status": status,
                    "ms": round(1000 * seconds, 1),
                    **fields,
                }
            },
        )

    def text(self) -> bytes:
        """All numbers, of all workers, in Prometheus's text format."""
        if not self._shared:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
