"""A server to test, over real sockets: with a model that needs no network, in this process or in its own."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import uvicorn
from PIL import Image

from headstart.ship import listening
from headstart.ship.limits import MIB, Limits
from headstart.ship.server import application

CLASSES = ["red", "green", "blue"]
TIGHT = Limits(
    request_bytes=MIB, pixels=1_000_000, files=4, waiting_bytes=16 * MIB, head_seconds=1.0, seconds=3.0
)


@dataclass
class Said:
    label: str
    probability: float
    probabilities: dict[str, float]
    unsure: bool


@dataclass
class Calibrated:
    threshold: float | None = 0.6
    wanted: float | None = 0.95
    temperature: float = 1.3
    val: dict[str, Any] | None = field(default_factory=lambda: {"n": 120})
    test: dict[str, Any] | None = field(
        default_factory=lambda: {"n": 290, "answered": 0.87, "accuracy": 0.961, "interval": [0.92, 0.98]}
    )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"risk_coverage": [(0.1, 1.0, 0.2)]}


class Brightest:
    """Says which channel is brightest; the more, the surer."""

    def __init__(self, folder: Path, *, seconds: float = 0.0, card: Mapping[str, Any] | None = None) -> None:
        self.classes = list(CLASSES)
        self.folder = folder
        self.calibration = Calibrated()
        self.card: dict[str, Any] = dict(card or {"method": "lp-ft", "model": "brightest", "licence": "mit"})
        self.seconds = seconds
        self.sizes: list[int] = []
        self.broken = False

    def prepare(self, img: Image.Image) -> np.ndarray:
        return np.asarray(img.resize((16, 16)))

    def judge(self, pixels: np.ndarray) -> list[Said]:
        self.sizes.append(len(pixels))
        time.sleep(self.seconds)
        if self.broken:
            raise RuntimeError("a secret of ours")
        logits = pixels.reshape(len(pixels), -1, 3).mean(1) / 32
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        rows = []
        for share in shares:
            order = np.argsort(-share)
            named = {CLASSES[i]: float(share[i]) for i in order}
            best = CLASSES[order[0]]
            rows.append(Said(best, named[best], named, named[best] < 0.6))
        return rows


def picture(colour: tuple[int, int, int] = (0, 250, 0), size: int = 40, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(stream, format)
    return stream.getvalue()


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> str:
        """A 4xx with a sentence."""
        assert 400 <= self.status < 500, (self.status, self.body[:300])
        sentence = self.json["error"]
        assert sentence[0] == sentence[0].upper() or ":" in sentence, sentence
        assert sentence.endswith((".", "?")), sentence
        assert "Traceback" not in sentence and len(sentence) < 400
        return str(sentence)


class Client:
    """One server's address."""

    def __init__(self, port: int, *, key: str | None = None) -> None:
        self.port, self.key = port, key
        self.url = f"http://127.0.0.1:{port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = dict(headers or {})
        if self.key is not None:
            sent.setdefault("Authorization", f"Bearer {self.key}")
        try:
            connection.request(method, path, body, sent)
            got = connection.getresponse()
            return Reply(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, None, {k.replace("_", "-"): v for k, v in headers.items()})

    def predict(self, body: bytes, kind: str | None = "application/octet-stream", query: str = "") -> Reply:
        return self.ask("POST", f"/predict{query}", body, {} if kind is None else {"Content-Type": kind})

    def json(self, value: Any) -> Reply:
        return self.predict(json.dumps(value).encode(), "application/json")

    def form(self, *files: tuple[str, bytes]) -> Reply:
        body, kind = form(*files)
        return self.predict(body, kind)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def alive(self) -> bool:
        """It still labels a picture."""
        reply = self.predict(picture())
        return reply.status == 200 and reply.json["predictions"][0]["label"] == "green"


def form(*files: tuple[str, bytes], boundary: str = "xxBOUNDARYxx") -> tuple[bytes, str]:
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n'
        b"Content-Type: image/png\r\n\r\n%s\r\n" % (boundary.encode(), name.encode(), content)
        for name, content in files
    ]
    return b"".join(parts) + b"--%s--\r\n" % boundary.encode(), f"multipart/form-data; boundary={boundary}"


def all_of(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            got += chunk
    return got


def one_of(connection: socket.socket, got: bytes = b"") -> Reply:
    """The next answer, by the length that it names; `got` of it has come already."""
    connection.settimeout(10)
    while True:
        head, end, body = got.partition(b"\r\n\r\n")
        if end and len(body) >= int(parsed(head + end).headers.get("content-length", "0")):
            return parsed(got)
        more = connection.recv(65536)
        assert more, got
        got += more


def parsed(raw: bytes) -> Reply:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(first.split()[1]), headers, body)


@contextlib.contextmanager
def running(
    model: Any, *, key: str | None = None, limits: Limits | None = None, **given: Any
) -> Iterator[Client]:
    """A server in a thread of this process."""
    limits = limits or Limits()
    app = application(model, limits=limits, key=key, **given)
    bound = listening.bind("127.0.0.1", 0)
    server = uvicorn.Server(listening.Config(listening.Built(app), limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    port = bound.getsockname()[1]
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield Client(port, key=key)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


class Alone(NamedTuple):
    """A server in a process of its own."""

    client: Client
    process: subprocess.Popen[bytes]
    log: Path

    def memory(self) -> float:
        """MiB that it holds."""
        return float(psutil.Process(self.process.pid).memory_info().rss / MIB)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextlib.contextmanager
def alone(folder: Path, *, seconds: float = 0.0) -> Iterator[Alone]:
    """`python serving.py FOLDER`: the model above, with tight limits."""
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), str(seconds)], stdout=subprocess.PIPE, stderr=stderr
        )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield Alone(Client(port), process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)
        process.stdout.close()


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    app = application(Brightest(folder, seconds=seconds), limits=TIGHT)
    bound = listening.bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    listening.serve(listening.Built(app), [bound], limits=TIGHT, started=lambda: print(port, flush=True))


if __name__ == "__main__":
    main()
