"""A bundle on its way to the Hub: what would be sent, what is sent, and what the Hub may answer."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.data.preprocess import Preprocess
from headstart.errors import ConfigError, ModelError, Unreachable
from headstart.nets.architecture import Architecture
from headstart.ship import bundle
from headstart.ship.push import plan, push


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Architecture("test_resnet", 2)
    where = tmp_path_factory.mktemp("bundle") / "model"
    bundle.save(
        where,
        config.build(),
        config=config,
        preprocess=Preprocess(size=32),
        classes=["ant", "bee"],
        card={"model": "test_resnet", "licence": "mit"},
    )
    return where


def test_a_dry_run_lists_what_would_be_sent_and_looks_at_no_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    said = push(folder, "somebody/ants", private=True, dry_run=True)
    assert said["url"] == "https://huggingface.co/somebody/ants" and said["private"]
    assert said["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert "model.safetensors" in said["files"]


@pytest.mark.parametrize("name", ["ants", "some body/ants", "a/b/c", "-a/b", ""])
def test_names_that_the_hub_does_not_take(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no name on the Hub|has no owner"):
        plan(name)


def test_what_is_no_bundle_is_not_sent(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no bundle"):
        push(tmp_path, "somebody/ants", dry_run=True)
    import shutil

    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    (moved / "labels.json").write_text('["bee", "ant"]')
    with pytest.raises(ModelError, match=r"labels\.json' was altered"):
        push(moved, "somebody/ants", dry_run=True)


def test_without_a_network_it_says_so(folder: Path) -> None:
    with pytest.raises(Unreachable, match="The Hub cannot be reached"):
        push(folder, "somebody/ants")  # the tests run offline


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push sees."""

    refuse = False
    seen: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path
        if self.refuse:
            return self._answer(403, {"error": "You may not write here."})
        if path == "/api/repos/create":
            self.seen.append((path, json.loads(body)))
            return self._answer(200, {"url": f"http://{self.headers['Host']}/somebody/ants"})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self._answer(
                200,
                {
                    "files": [
                        {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for each in files
                    ]
                },
            )
        if path.endswith("/commit/main"):
            self.seen.append((path, [json.loads(line) for line in body.splitlines() if line]))
            return self._answer(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/somebody/ants/commit/" + "0" * 40,
                    "commitOid": "0" * 40,
                    "success": True,
                },
            )
        return self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(200, {"id": "somebody/ants", "siblings": [], "sha": "0" * 40})

    def _answer(self, code: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.seen, Hub.refuse = [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SEND = """
import sys
from headstart.errors import HeadstartError
from headstart.ship.push import push
try:
    push(sys.argv[1], "somebody/ants")
except HeadstartError as error:
    sys.exit(f"refused: {error}")
"""


def send(folder: Path, hub: ThreadingHTTPServer, home: Path) -> subprocess.CompletedProcess[str]:
    """Against a server of our own, in a process whose client looks there."""
    ours = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(home),
    }
    return subprocess.run(
        [sys.executable, "-c", SEND, str(folder)], capture_output=True, text=True, env=os.environ | ours
    )


def test_every_file_arrives(folder: Path, hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = send(folder, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    made, sent = Hub.seen
    assert made[1]["name"] == "ants" and made[1]["organization"] == "somebody"
    got = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in sent[1]
        if line["key"] == "file"
    }
    assert got == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_refusal_is_one_sentence(folder: Path, hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    Hub.refuse = True
    done = send(folder, hub, tmp_path)
    assert done.returncode == 1
    assert "refused: The Hub refused to write to 'somebody/ants'" in done.stderr
    assert "hf auth login" in done.stderr and "Traceback" not in done.stderr
