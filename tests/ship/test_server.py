"""What the server answers, over real sockets."""

from __future__ import annotations

import base64
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import CLASSES, TIGHT, Brightest, Client, alone, form, picture, running

from headstart.ship.limits import Limits

FORM = "multipart/form-data; boundary=b"
RED, GREEN, BLUE = picture((250, 0, 0)), picture((0, 250, 0)), picture((0, 0, 250))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "README.md").write_text("# brightest\n", encoding="utf-8")
    with running(Brightest(folder), limits=TIGHT, hosts=["localhost", "127.0.0.1", "::1"]) as here:
        yield here


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


# -------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    "kind", ["application/octet-stream", "image/png", "image/jpeg", "application/x-www-form-urlencoded", None]
)
def test_a_picture_as_it_is(kind: str | None, client: Client) -> None:
    reply = client.predict(GREEN, kind)
    assert reply.status == 200, reply.body
    (row,) = reply.json["predictions"]
    assert row["label"] == "green" and row["error"] is None and row["name"] is None
    assert row["probability"] == row["best"][0]["probability"] > 0.9 and row["unsure"] is False
    assert [each["label"] for each in row["best"]] == ["green", "red", "blue"]
    assert abs(sum(each["probability"] for each in row["best"]) - 1) < 1e-6


def test_a_form_with_one_and_with_many(client: Client) -> None:
    (row,) = client.form(("a b.png", RED)).json["predictions"]
    assert row["name"] == "a b.png" and row["label"] == "red"
    rows = client.form(("1", RED), ("2", GREEN), ("3", BLUE)).json["predictions"]
    assert [(row["name"], row["label"]) for row in rows] == [("1", "red"), ("2", "green"), ("3", "blue")]


def test_base64_in_json(client: Client) -> None:
    assert client.json({"image": text(BLUE)}).json["predictions"][0]["label"] == "blue"
    url = f"data:image/png;base64,{text(RED)}"
    many = [text(GREEN), {"data": url, "name": "r.png"}, "\n".join([text(BLUE)[:40], text(BLUE)[40:]])]
    rows = client.json({"images": many}).json["predictions"]
    assert [(row["name"], row["label"]) for row in rows] == [
        (None, "green"),
        ("r.png", "red"),
        (None, "blue"),
    ]


def test_unsure_below_the_threshold(client: Client) -> None:
    (row,) = client.predict(picture((120, 125, 120))).json["predictions"]
    assert row["unsure"] is True and row["probability"] < 0.6


def test_the_most_probable_only(client: Client) -> None:
    (row,) = client.predict(GREEN, query="?top=1").json["predictions"]
    assert row["best"] == [{"label": "green", "probability": row["probability"]}]
    assert len(client.predict(GREEN, query="?top=9999").json["predictions"][0]["best"]) == 3
    for wrong in ("0", "-1", "x", "1e9", "9" * 5000):
        assert "top" in client.predict(GREEN, query=f"?top={wrong}").refusal


def test_one_broken_among_many_is_a_row(client: Client) -> None:
    reply = client.form(("ok.png", RED), ("bad.png", b"hello"), ("ok2.png", BLUE))
    assert reply.status == 200
    rows = reply.json["predictions"]
    assert [row["label"] for row in rows] == ["red", None, "blue"]
    assert "text file" in rows[1]["error"] and rows[1]["best"] == [] and rows[1]["probability"] is None


def test_only_broken_ones_are_refused(client: Client) -> None:
    assert client.form(("bad.png", b"hello")).refusal == "bad.png: is a text file, not a picture."
    reply = client.form(("bad.png", b"hello"), ("cut.png", RED[:60]))
    assert reply.status == 422 and "None of the 2 pictures" in reply.refusal
    assert [row["name"] for row in reply.json["predictions"]] == ["bad.png", "cut.png"]


# ------------------------------------------------------------------------------------------ other addresses


def test_what_is_said_of_the_model(client: Client) -> None:
    assert client.get("/labels").json == {"labels": CLASSES}
    card = client.get("/card").json
    assert card["card"]["licence"] == "mit" and card["readme"].startswith("# brightest")
    assert card["calibration"]["threshold"] == 0.6 and card["calibration"]["temperature"] == 1.3
    assert "risk_coverage" not in card["calibration"] and card["limits"]["files"] == 4
    assert client.get("/health").json == {"status": "ok"}
    assert client.get("/ready").json == {"status": "ready"}


def test_numbers_for_prometheus(client: Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    client.predict(GREEN)
    client.predict(b"no")
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {
        (sample.name, sample.labels.get("label") or sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }
    assert values["headstart_predictions_total", "green"] >= 1
    assert values["headstart_predictions_total", "blue"] >= 0
    assert values["headstart_requests_total", "422"] >= 1 and values["headstart_unreadable_total", None] >= 1
    assert values["headstart_batch_size_count", None] >= 1
    assert values["process_resident_memory_bytes", None] > 0


def test_the_description_is_openapi(client: Client) -> None:
    document = client.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert {"/predict", "/labels", "/card", "/health", "/ready", "/metrics"} == set(document["paths"])
    assert "multipart/form-data" in document["paths"]["/predict"]["post"]["requestBody"]["content"]


def test_every_answer_is_dressed(client: Client) -> None:
    for path in ("/", "/labels", "/nowhere", "/page/nowhere.js"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"] and "x-request-id" in headers
        assert "server" not in headers and "access-control-allow-origin" not in headers
    assert client.get("/labels", X_Request_ID="mine-1").headers["x-request-id"] == "mine-1"
    assert client.get("/labels", X_Request_ID="<x y>").headers["x-request-id"] != "<x y>"
    assert client.get("/labels").headers["cache-control"] == "no-store"


def test_addresses_and_methods_that_do_not_exist(client: Client) -> None:
    for path in ("/nowhere", "/page/../server.py", "/page/%2e%2e/server.py", "/page//etc/passwd", "/docs"):
        assert client.get(path).refusal.startswith("There is nothing")
    reply = client.get("/predict")
    assert reply.status == 405 and "does not take" in reply.refusal and reply.headers["allow"] == "POST"


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"", None, 400, "empty"),
        (b"x", "text/html", 415, "text/html"),
        (b"x", "multipart/form-data", 400, "no boundary"),
        (b"x", FORM, 400, "broken"),
        (b"x", "multipart/form-data; boundary=" + "b" * 2000, 400, "broken"),
        (b"--b--\r\n", FORM, 422, "no picture"),
        (b"--b\r\nContent-Disposition: form-data; name=a; filename=a\r\n\r\nx", FORM, 400, "cut off"),
        (b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n--b--", FORM, 422, "'a' of the form is"),
        (b"--b\r\n\r\nx\r\n--b--", FORM, 422, "is no file"),
        (b"{", "application/json", 400, "not valid JSON"),
        (b"\xff", "application/json", 400, "not valid JSON"),
        (b"[" * 100_000, "application/json", 400, "not valid JSON"),
        (b'{"image": ' + b"9" * 9999 + b"}", "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 422, "object is expected"),
        (b"{}", "application/json", 422, "exactly one"),
        (b'{"image": "", "images": []}', "application/json", 422, "exactly one"),
        (b'{"imge": "x"}', "application/json", 422, "Did you mean 'image'"),
        (b'{"\\ud800": "x"}', "application/json", 422, "unknown key"),
        (b'{"image": 3}', "application/json", 422, "is a picture in base64"),
        (b'{"image": "%%%"}', "application/json", 422, "not valid base64"),
        (b'{"image": "\xc3\xa4"}', "application/json", 422, "not valid base64"),
        (b'{"image": "data:x,y"}', "application/json", 422, "without base64"),
        (b'{"image": {"data": "", "nme": ""}}', "application/json", 422, "Did you mean 'name'"),
        (b'{"image": {"data": "", "name": 3}}', "application/json", 422, "a text"),
        (b'{"image": {"data": "eA==", "name": "\\ud800/\\u202ea.exe"}}', "application/json", 422, "a.exe: "),
        (b'{"images": "x"}', "application/json", 422, "a list"),
        (b'{"images": []}', "application/json", 422, "no picture"),
        (b'{"images": ["eA==", 3]}', "application/json", 422, '"images"[1]'),
        (b'{"images": ["eA==","eA==","eA==","eA==","eA=="]}', "application/json", 413, "At most 4 pictures"),
        (b"hello", None, 422, "text file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None, 422, "text file"),
    ],
)  # fmt: skip
def test_a_body_that_is_not_taken(
    body: bytes, kind: str | None, status: int, said: str, client: Client
) -> None:
    reply = client.predict(body, kind)
    assert said in reply.refusal and reply.status == status


def test_too_many_files_in_a_form(client: Client) -> None:
    reply = client.form(*[(f"{i}.png", RED) for i in range(5)])
    assert reply.status == 413 and "At most 4 pictures" in reply.refusal


def test_file_names_are_only_echoed(client: Client) -> None:
    names = [
        "../../../etc/passwd",
        "..\\..\\boot.ini",
        "/etc/shadow",
        "C:\\x\\y.png",
        "a\x00b.png",
        "x" * 9000,
    ]
    for name in names:
        reply = client.predict(*form((name, b"no picture")))
        if "form is broken" in reply.refusal:
            continue
        said = reply.refusal
        assert len(said) < 300 and "/" not in said and "\\" not in said and "\x00" not in said, said
    nothing = [{"name": "."}, {"name": ".."}, {"name": "ok\r\nSet-Cookie: x=1"}]
    for each in nothing:
        reply = client.json({"image": {"data": text(RED), **each}})
        assert reply.status == 200 and "\n" not in (reply.json["predictions"][0]["name"] or "")
        assert "set-cookie" not in reply.headers


def test_the_host_header(client: Client) -> None:
    for name in ("localhost:80", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/labels", Host=name).status == 200
    for name in ("evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", ""):
        reply = client.get("/labels", Host=name)
        assert reply.status == 421 and "--allow-host" in reply.refusal
        assert client.get("/", Host=name).status == 421


# ----------------------------------------------------------------------------------------------------- keys


def test_the_key(tmp_path: Path) -> None:
    with running(Brightest(tmp_path), key="sesame-street") as client:
        assert client.alive() and client.get("/card").status == 200
        bare = Client(client.port)
        for path in ("/labels", "/card", "/metrics", "/nowhere"):
            reply = bare.get(path)
            assert reply.status == 401 and "key is needed" in reply.refusal
            assert reply.headers["www-authenticate"] == "Bearer"
        assert bare.predict(GREEN).status == 401
        for path in ("/", "/health", "/ready", "/openapi.json"):
            assert bare.get(path).status == 200
        for wrong in ("sesame", "sesame-streeT", "sesame-street ", "Bearer", "\xe4" * 9, "x" * 9000):
            assert bare.get("/labels", X_API_Key=wrong.strip()).status in (200, 401)
            reply = bare.get("/labels", Authorization=f"Bearer {wrong}x")
            assert reply.status == 401 and reply.refusal == "This key is not the right one."
        assert bare.get("/labels", X_API_Key="sesame-street").status == 200
        assert bare.get("/labels", Authorization="bearer sesame-street").status == 200
        assert bare.get("/labels", Authorization="Basic sesame-street").status == 401
        document = bare.get("/openapi.json").json
        assert document["paths"]["/predict"]["post"]["security"]
        assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}


def test_keys_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    from headstart.ship import guard

    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(guard.hmac, "compare_digest", watched)
    with running(Brightest(tmp_path), key="sesame-street") as client:
        for key in ("s", "sesame-street", "x" * 5000):
            client.get("/labels", X_API_Key=key, Authorization="")
    assert compared == [(32, 32)] * 3, "digests of one length, whatever was given"


# ------------------------------------------------------------------------------------------ batches and load


def test_pictures_of_many_clients_share_a_batch(tmp_path: Path) -> None:
    model = Brightest(tmp_path, seconds=0.05)
    with running(model, batch_size=8) as client, ThreadPoolExecutor(16) as threads:
        model.sizes.clear()
        replies = list(threads.map(lambda i: client.predict([RED, GREEN, BLUE][i % 3]), range(48)))
    assert [reply.json["predictions"][0]["label"] for reply in replies] == ["red", "green", "blue"] * 16
    assert sum(model.sizes) == 48 and max(model.sizes) <= 8 and len(model.sizes) < 30, model.sizes


def test_a_lone_picture_waits_for_nobody(tmp_path: Path) -> None:
    with running(Brightest(tmp_path), patience=5.0) as client:
        began = time.monotonic()
        assert client.alive()
        assert time.monotonic() - began < 2.5


def test_200_clients_at_once(tmp_path: Path) -> None:
    gate = threading.Barrier(200)
    with running(Brightest(tmp_path, seconds=0.002)) as client, ThreadPoolExecutor(200) as threads:

        def one(i: int) -> list[Any]:
            gate.wait(30)
            return [client.predict([RED, GREEN, BLUE][(i + k) % 3]) for k in range(3)]

        said = [
            [r.json["predictions"][0]["label"] for r in replies] for replies in threads.map(one, range(200))
        ]
    assert said == [[CLASSES[(i + k) % 3] for k in range(3)] for i in range(200)]


def test_more_than_it_takes_are_told_to_come_again(tmp_path: Path) -> None:
    limits = Limits(requests=2, seconds=10)
    with running(Brightest(tmp_path, seconds=0.4), limits=limits, batch_size=1) as client:
        with ThreadPoolExecutor(8) as threads:
            replies = list(threads.map(lambda _: client.predict(GREEN), range(8)))
        refused = [reply for reply in replies if reply.status != 200]
        assert {reply.status for reply in refused} == {429} and 1 <= len(refused) <= 6
        assert all("Too busy" in reply.refusal and reply.headers["retry-after"] == "1" for reply in refused)
        assert client.alive()


def test_an_answer_that_takes_too_long(tmp_path: Path) -> None:
    model = Brightest(tmp_path)
    with running(model, limits=Limits(seconds=0.4)) as client:
        model.seconds = 1.5
        began = time.monotonic()
        reply = client.predict(GREEN)
        assert reply.status == 429 and "within 0.4 s" in reply.refusal
        model.seconds = 0.0
        seen = []  # the batch began a little after the request, so it is not stuck at once
        while seen[-1:] != [200] or 503 not in seen:
            assert time.monotonic() - began < 20, seen
            seen.append(client.get("/ready").status)
            time.sleep(0.02)
        while not client.alive():
            assert time.monotonic() - began < 20


def test_bytes_of_all_requests_together(tmp_path: Path) -> None:
    limits = Limits(waiting_bytes=300_000, request_bytes=200_000, seconds=10)
    with running(Brightest(tmp_path), limits=limits) as client:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 190000\r\n\r\n"
        slow = client.connect()
        slow.sendall(head + b"x" * 180_000)  # the rest does not come
        time.sleep(0.3)
        reply = client.predict(b"x" * 190_000)
        assert reply.status == 429 and "are waiting" in reply.refusal
        assert client.alive(), "small pictures still find room"
        slow.close()
        time.sleep(0.3)
        assert client.predict(b"\0" * 190_000).status == 422, "what was held is given back"


def test_a_bug_of_ours_is_a_sentence_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Brightest(tmp_path)
    with running(model) as client:
        model.broken = True
        reply = client.predict(GREEN)
        assert reply.status == 500 and "its log" in reply.json["error"] and b"secret" not in reply.body
        model.broken = False
        assert client.alive()


# ---------------------------------------------------------------------------------------------- its process


def test_the_log_tells_no_secrets(tmp_path: Path) -> None:
    with alone(tmp_path) as server:
        server.client.form(("secret-name.png", GREEN))
        server.client.get("/secret-path?secret-query=1", X_API_Key="secret-key")
        server.client.predict(b"secret content")
        while len(lines := server.lines()) < 3:  # written when the answer is out
            time.sleep(0.02)
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("POST", "/predict", 200),
        ("GET", "(none)", 404),
        ("POST", "/predict", 422),
    ]
    assert requests[0]["pictures"] == 1 and requests[0]["bytes"] > 100 and requests[0]["ms"] >= 0
    assert requests[0]["client"] == "127.0.0.1" and len(requests[0]["id"]) == 16
    assert "secret" not in server.log.read_text()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_what_is_under_way_and_stops(sign: signal.Signals, tmp_path: Path) -> None:
    with alone(tmp_path, seconds=0.7) as server, ThreadPoolExecutor(1) as threads:
        under_way = threads.submit(server.client.predict, GREEN)
        time.sleep(0.3)
        server.process.send_signal(sign)
        assert under_way.result(10).json["predictions"][0]["label"] == "green"
        assert server.process.wait(10) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.client.port), timeout=1)
    assert "Traceback" not in server.log.read_text()


def test_json_is_what_it_says(client: Client) -> None:
    """Every row has the fields that the description promises."""
    schema = client.get("/openapi.json").json["components"]["schemas"]["Row"]
    (row,) = client.predict(GREEN).json["predictions"]
    assert set(row) == set(schema["properties"]) == set(schema["required"])
    json.dumps(row)
