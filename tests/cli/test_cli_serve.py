"""`headstart serve`: what it refuses before it starts, and the whole of it as a process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from typed import Typed, typing

from headstart.cli import outcome, serve
from headstart.data.preprocess import Preprocess
from headstart.ship import bundle, listening
from headstart.ship.export import export

CLASSES = ["red", "green", "blue"]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.delenv(serve.KEY, raising=False)
    return typing(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose network says which channel is brightest, as safetensors and ONNX."""
    import torch

    from headstart.nets import zoo

    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    found = zoo.load("test_resnet", pretrained=False, img_size=32)
    found.net.reset_classifier(3)  # type: ignore[operator]
    bundle.save(
        folder / "model",
        found.net.eval(),
        config=found.config,
        preprocess=Preprocess(size=32),
        classes=CLASSES,
        card={"model": "test_resnet", "licence": "mit"},
    )
    export(folder / "model", folder / "bundle", formats=("onnx",), check=False)
    return folder / "bundle"


def picture(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


# --------------------------------------------------------------------------------------------- refusals


def test_other_machines_need_a_key(typed: Typed, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        refusal = typed("serve", tmp_path, "--host", host).refusal
        assert "lets other machines in" in refusal and "--api-key" in refusal and "--no-key" in refusal
    # With a key, or told so, it goes on, to what is wrong next.
    for told in (("--api-key", "sesame-street"), ("--no-key",)):
        assert "holds no model" in typed("serve", tmp_path, "--host", "0.0.0.0", "--port", 0, *told).refusal


def test_keys_that_are_none(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "too short" in typed("serve", tmp_path, "--api-key", "short").refusal
    assert "printable ASCII" in typed("serve", tmp_path, "--api-key", "with a space").refusal
    monkeypatch.setenv(serve.KEY, "kürbiskuchen")
    assert "printable ASCII" in typed("serve", tmp_path).refusal


def test_a_port_that_is_taken_is_said_before_the_model_is_read(typed: Typed, tmp_path: Path) -> None:
    with listening.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        refusal = typed("serve", tmp_path / "nowhere", "--port", port).refusal
    assert f"Port {port} of 127.0.0.1 is taken" in refusal and "\n" not in refusal


def test_no_model(typed: Typed, tmp_path: Path) -> None:
    assert "There is no folder" in typed("serve", tmp_path / "nowhere", "--port", 0).refusal
    assert "holds no model" in typed("serve", tmp_path, "--port", 0, "--workers", 2).refusal


def test_an_altered_bundle(typed: Typed, tmp_path: Path, made: Path) -> None:
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.onnx").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(weights)
    assert "model.onnx" in typed("serve", tmp_path, "--port", 0).refusal


def test_without_the_extra(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert (
        "needs uvicorn. Install the extra: pip install 'headstart[serve]'" in typed("serve", tmp_path).refusal
    )


# ----------------------------------------------------------------------------------- once it has started


def test_it_serves_until_it_is_told_to_stop(
    typed: Typed, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: SIGTERM comes as soon as it says that it has started."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "classes at" in text:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(outcome, "say", say)
    before = signal.getsignal(signal.SIGTERM)
    ended = typed("serve", made, "--port", 0, "--api-key", "sesame-street")
    assert ended.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert len(said) == 2 and ", with a key. Stop with Ctrl-C." in said[0] and said[1] == "stopped."


# ---------------------------------------------------------------------------------------- as a process


@contextmanager
def served(model: Path, *words: str, log: Path, **env: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The command, and the address that it named."""
    command = [sys.executable, "-m", "headstart", "serve", str(model), "--port", "0", *words]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env={**os.environ, **env})
    try:
        deadline = time.monotonic() + 60
        while "http://" not in (said := log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)
        yield "http://" + said.partition("http://")[2].split()[0].rstrip(".,"), process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ask(url: str, body: bytes | None = None, **headers: str) -> Any:
    request = urllib.request.Request(url, body, headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def test_a_bundle_is_served_without_torch_and_says_what_predict_says(made: Path, tmp_path: Path) -> None:
    from headstart.ship.predict import load

    path = picture(tmp_path / "noise.png")
    (expected,) = load(made, engine="onnx").predict(path)
    with served(made, log=tmp_path / "log") as (address, process):
        (row,) = ask(f"{address}/predict", path.read_bytes(), **{"Content-Type": "image/png"})["predictions"]
        assert row["label"] == expected.label and row["unsure"] == expected.unsure
        assert {each["label"]: each["probability"] for each in row["best"]} == pytest.approx(
            expected.probabilities, abs=1e-6
        )
        assert ask(f"{address}/card")["card"]["licence"] == "mit"
        if sys.platform == "linux":
            loaded = Path(f"/proc/{process.pid}/maps").read_text()
            assert "onnxruntime" in loaded and "libtorch" not in loaded
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    said = (tmp_path / "log").read_text()
    assert "3 classes at http://127.0.0.1:" in said and said.rstrip().endswith("headstart: stopped.")


def test_several_workers_share_the_port_the_key_and_the_numbers(made: Path, tmp_path: Path) -> None:
    key = {"Authorization": "Bearer sesame-street"}
    body = picture(tmp_path / "noise.png").read_bytes()
    given = {serve.KEY: "sesame-street", "OMP_NUM_THREADS": "1"}
    with served(made, "--workers", "2", log=tmp_path / "log", **given) as (address, process):
        for _ in range(20):
            assert len(ask(f"{address}/predict", body, **key)["predictions"]) == 1
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{address}/labels")
        request = urllib.request.Request(f"{address}/metrics", headers=key)
        with urllib.request.urlopen(request, timeout=30) as reply:
            numbers = reply.read().decode()
        counted = 'headstart_requests_total{method="POST",route="/predict",status="200"} 20.0'
        assert counted in numbers, "of both workers together"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.terminate()
        assert process.wait(30) == 0
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "no worker is left behind"
    assert "sesame" not in (tmp_path / "log").read_text()
