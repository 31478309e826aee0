"""What strangers do to a server: it answers with a sentence, lives, and holds no more memory than before."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from serving import TIGHT, Alone, Brightest, Reply, all_of, alone, form, one_of, parsed, picture, running

from headstart.ship.limits import MIB, Limits

MUTANTS = int(os.environ.get("HEADSTART_MUTANTS", "1000"))  # 10000 where there is time
FLAT = 40  # MiB that a process may grow by: arenas of the allocator, code loaded on the way


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with alone(tmp_path_factory.mktemp("hostile")) as here:
        for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):  # whatever is loaded once, is loaded
            assert here.client.predict(picture(format=format)).status == 200
        before = here.memory()
        yield here
        assert here.process.poll() is None, "it lives"
        assert here.memory() - before < 2 * FLAT, "after all of it"
        assert "Traceback" not in here.log.read_text()


@pytest.fixture(autouse=True)
def _lives_and_is_as_large_as_before(server: Alone) -> Iterator[None]:
    before = server.memory()
    yield
    assert server.client.alive()
    assert server.memory() - before < FLAT
    deadline = time.monotonic() + 10
    while connections(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not connections(server), "nobody is kept hold of"


def connections(server: Alone) -> int:
    every = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED for each in every)


# -------------------------------------------------------------------------------------------------- bodies


def mutant(rng: np.random.Generator) -> tuple[bytes, str]:
    """A body that was good, and its Content-Type, with something done to either."""
    format = str(rng.choice(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]))
    noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    stream = io.BytesIO()
    noise.save(stream, format)
    content = bytearray(stream.getvalue())
    way = rng.integers(4)
    if way > 1:
        content = changed(content, rng)
    if way == 0:
        body, kind = form((f"{rng.integers(99)}.png", bytes(content)), ("b.png", bytes(content)))
    elif way == 1:
        body = json.dumps({"images": [base64.b64encode(content).decode()] * 2}).encode()
        kind = "application/json"
    else:
        body, kind = bytes(content), f"image/{format.lower()}"
    if way < 2:
        body = bytes(changed(bytearray(body), rng))
        if rng.random() < 0.2:
            kind = bytes(changed(bytearray(kind.encode()), rng)).decode("latin-1")
            kind = "".join(letter for letter in kind if " " <= letter <= "~").strip() or "x"
    return body, kind


def changed(content: bytearray, rng: np.random.Generator) -> bytearray:
    for _ in range(rng.integers(1, 5)):
        size = max(1, len(content))
        start = int(rng.integers(size))
        end = min(size, start + int(rng.integers(1, 40)))
        match rng.integers(6):
            case 0:
                content[start:end] = rng.bytes(end - start)
            case 1:
                content[start:] = b""
            case 2:
                content[start:end] = b""
            case 3:
                content[start:start] = content[start:end] * int(rng.integers(1, 9))
            case 4:
                content[start : start + 4] = struct.pack(">I", int(rng.integers(2**32)))
            case _:
                content[start : start + 1] = bytes([int(rng.choice([0, 255, 127, 13, 10, 34, 45]))])
    return content


def test_mutated_bodies(server: Alone) -> None:
    """Each is labelled, or refused with a sentence; never a mistake of the server's."""
    rng = np.random.default_rng(0)
    connection = http.client.HTTPConnection("127.0.0.1", server.client.port, timeout=20)
    statuses: dict[int, int] = {}
    for _ in range(MUTANTS):
        body, kind = mutant(rng)
        try:
            connection.request("POST", "/predict", body, {"Content-Type": kind})
            got = connection.getresponse()
        except ConnectionError:  # this machine stood still for a second: the connection was idle too long
            connection.close()
            connection.request("POST", "/predict", body, {"Content-Type": kind})
            got = connection.getresponse()
        reply = Reply(got.status, {}, got.read())
        statuses[reply.status] = statuses.get(reply.status, 0) + 1
        if reply.status != 200:
            assert reply.refusal, (body[:80], kind)
    connection.close()
    assert statuses[200] > MUTANTS / 20 and statuses[422] > MUTANTS / 20 and statuses[400] > MUTANTS / 50
    assert sum(statuses.values()) == MUTANTS and max(statuses) < 500


# --------------------------------------------------------------------------------------------------- bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, bits: int = 1, data: bytes = b"", between: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + between + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    content = bytearray(picture(format="JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


BMP = picture(format="BMP")
ZEROS = zlib.compress(bytes(60_000_000), 9)  # 58 kB that become 60 MB


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("a header of 40,000 x 40,000", png(40_000, 40_000)),
        ("pixels for 20,000 x 20,000", png(20_000, 20_000, data=ZEROS)),
        ("just above the limit", png(1001, 1000, data=ZEROS)),
        ("a JPEG's header", jpeg(65_500, 65_500)),
        ("a GIF's header", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + picture(format="GIF")[10:]),
        (
            "a BMP's header",
            picture(format="BMP")[:18] + struct.pack("<ii", 9999, 9999) + picture(format="BMP")[26:],
        ),
        ("a PPM's header", b"P6 50000 50000 255\n" + bytes(99)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_that_would_be_giants(what: str, content: bytes, server: Alone) -> None:
    began = time.monotonic()
    reply = server.client.predict(content)
    assert reply.status == 422 and "too large" in reply.refusal, (what, reply.refusal)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "content",
    [
        png(10, 10, data=ZEROS),
        png(10, 10, data=zlib.compress(bytes(20)), between=chunk(b"zTXt", b"a\0\0" + ZEROS)),
        png(10, 10, data=zlib.compress(bytes(20)), between=chunk(b"iCCP", b"a\0\0" + ZEROS)),
        gzip.compress(bytes(60_000_000)),
        picture(format="JPEG") + bytes(900_000),
        b"\xff\xd8" + b"\xff\xfe\xff\xff" * 200_000,
    ],
    ids=["pixels", "text", "profile", "gzip", "tail", "comments"],
)
def test_small_bodies_that_grow(content: bytes, server: Alone) -> None:
    for _ in range(5):
        reply = server.client.predict(content)
        assert reply.status == 200 or reply.refusal


def test_a_body_in_a_coding_is_not_unpacked(server: Alone) -> None:
    body = gzip.compress(picture())
    reply = server.client.ask("POST", "/predict", body, {"Content-Encoding": "gzip"})
    assert reply.status == 422 and reply.refusal


def test_decoding_that_never_ends_is_given_up(tmp_path: Path) -> None:
    """Scan after scan of a progressive JPEG, each a few bytes, each over all pixels."""
    stream = io.BytesIO()
    Image.new("L", (4000, 4000)).save(stream, "JPEG", progressive=True, quality=1)
    content = stream.getvalue()
    # A scan that refines what it has: repeated, it costs the decoder a pass each time.
    scan = content[content.rindex(b"\xff\xda") : -2]
    bomb = content[:-2] + scan * (8 * MIB // len(scan)) + b"\xff\xd9"
    with running(Brightest(tmp_path), limits=Limits(seconds=1.0)) as client:
        began = time.monotonic()
        reply = client.predict(bomb)
        assert reply.status in (422, 429) and reply.refusal
        assert time.monotonic() - began < 20
        assert client.alive()


# ------------------------------------------------------------------------------------------------ too much


def test_too_long_a_body(server: Alone) -> None:
    reply = server.client.predict(bytes(TIGHT.request_bytes + 1))
    assert reply.status == 413 and "at most 1 MB" in reply.refusal
    with server.client.connect() as link:  # what was announced need not be sent, nor anything after it read
        link.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert one_of(link).status == 413
        began = time.monotonic()
        try:
            while time.monotonic() - began < 20:
                link.sendall(bytes(65536))
        except OSError:
            pass
        assert time.monotonic() - began < 15, "it hangs up on who goes on"
    with server.client.connect() as link:  # without saying how much
        link.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        block = b"10000\r\n" + bytes(65536) + b"\r\n"
        for _ in range(17):
            link.sendall(block)
        assert one_of(link).status == 413


@pytest.mark.parametrize(
    "head",
    [
        b"GET /labels HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000,
        b"GET /labels HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100_000,
        b"GET /" + b"a" * 1_000_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"GET / HTTX/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"\r\n" * 50_000,
    ],
    ids=[
        "value",
        "lines",
        "target",
        "tls",
        "version",
        "host",
        "nul",
        "negative",
        "two",
        "chunk",
        "coding",
        "ends",
    ],
)
def test_what_is_no_request(head: bytes, server: Alone) -> None:
    with server.client.connect() as link:
        try:
            link.sendall(head)
        except OSError:
            return  # hung up on, before it had said all
        reply = parsed(all_of(link))
    assert reply.status in (400, 501) and reply.json["error"].endswith(".")


def test_an_upgrade_is_not_taken_up(server: Alone) -> None:
    asked = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "x",
        "Sec-WebSocket-Version": "13",
    }
    assert server.client.get("/labels", **{k.replace("-", "_"): v for k, v in asked.items()}).status == 200


def test_more_connections_than_it_takes(tmp_path: Path) -> None:
    with running(Brightest(tmp_path), limits=Limits(connections=10, head_seconds=5)) as client:
        links = [client.connect() for _ in range(25)]
        time.sleep(0.3)
        told = []
        for link in links:
            link.setblocking(False)
            try:
                told.append(parsed(link.recv(65536)))
            except BlockingIOError:
                continue
        assert len(told) == 15 and all(reply.status == 429 and reply.refusal for reply in told)
        for link in links:
            link.close()
        time.sleep(0.2)
        assert client.alive()


# ------------------------------------------------------------------------------------------------ too slow


def drip(link: socket.socket, content: bytes, seconds: float) -> Reply | None:
    """Send a byte at a time until the other side has had enough; what it said."""
    link.settimeout(0.1)
    deadline = time.monotonic() + seconds
    for byte in content:
        assert time.monotonic() < deadline, "it waits for ever"
        try:
            link.sendall(bytes([byte]))
            got = link.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return None
        return one_of(link, got) if got else None
    raise AssertionError("it waits for ever")


def test_clients_that_drip_their_headers(server: Alone) -> None:
    def one(_: int) -> Reply | None:
        with server.client.connect() as link:
            return drip(link, b"GET /labels HTTP/1.1\r\nX: " + b"y" * 500, 10 + TIGHT.head_seconds)

    with ThreadPoolExecutor(40) as threads:
        slow = [threads.submit(one, i) for i in range(40)]
        for _ in range(5):  # meanwhile everybody else is served
            began = time.monotonic()
            assert server.client.alive()
            assert time.monotonic() - began < 5
            time.sleep(0.1)
        replies = [each.result() for each in slow]
    assert all(reply is not None and reply.status == 408 for reply in replies)
    assert replies[0] is not None and "headers" in replies[0].refusal


def test_clients_that_drip_their_second_request(server: Alone) -> None:
    with server.client.connect() as link:
        link.sendall(b"GET /labels HTTP/1.1\r\nHost: x\r\n\r\n")
        assert one_of(link).status == 200
        reply = drip(link, b"GET /labels HTTP/1.1\r\nX: " + b"y" * 500, 10 + TIGHT.head_seconds)
    assert reply is not None and reply.status == 408


def test_clients_that_drip_their_body(server: Alone) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"

    def one(_: int) -> Reply | None:
        with server.client.connect() as link:
            link.sendall(head)
            return drip(link, bytes(500), 10 + TIGHT.seconds)

    with ThreadPoolExecutor(20) as threads:
        slow = [threads.submit(one, i) for i in range(20)]
        time.sleep(0.5)
        assert server.client.alive()
        replies = [each.result() for each in slow]
    assert all(reply is not None and reply.status == 408 for reply in replies)
    assert replies[0] is not None and "did not arrive within 3 s" in replies[0].refusal


def test_clients_that_say_nothing(server: Alone) -> None:
    links = [server.client.connect() for _ in range(30)]
    began = time.monotonic()
    assert [all_of(link) for link in links] == [b""] * 30
    assert time.monotonic() - began < 10 + TIGHT.head_seconds
    for link in links:
        link.close()


def test_clients_that_do_not_read(server: Alone) -> None:
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect(("127.0.0.1", server.client.port))
    link.settimeout(0.2)
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50
    deadline = time.monotonic() + 20
    with pytest.raises(OSError) as ended:  # until it hangs up, not until we have said all
        while time.monotonic() < deadline:
            try:
                link.sendall(asked)
            except TimeoutError:
                time.sleep(0.1)
                if not connections(server):
                    raise ConnectionResetError from None
    assert not isinstance(ended.value, TimeoutError)
    link.close()


def test_clients_that_leave_in_the_middle(server: Alone) -> None:
    for sent in (0, 10, 70_000):
        for _ in range(20):
            with server.client.connect() as link:
                link.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + bytes(sent)
                )
    whole = picture()
    for _ in range(20):
        with server.client.connect() as link:  # asked, and gone before the answer
            link.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole
            )
