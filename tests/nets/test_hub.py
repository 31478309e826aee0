import json
import ssl
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from headstart.errors import ModelError, Unreachable
from headstart.nets import hub
from headstart.nets.zoo import load


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (HTTPError("https://example.org", 404, "not found", Message(), None), True),
        (URLError(OSError("no route")), False),
        (URLError(ssl.SSLError("a certificate of the house")), True),
        (TimeoutError(), False),
        (None, True),
    ],
)
def test_whether_a_server_answers(
    error: Exception | None, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer:
        def __enter__(self) -> None:
            if error is not None:
                raise error

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(hub, "urlopen", lambda *_, **__: Answer())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.reachable("https://example.org/x") is answer
    assert hub.reachable("owner/name") is answer
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.reachable("owner/name") is False


def test_reasons_are_told_apart() -> None:
    assert (
        hub.offline(ConnectionError())
        and hub.offline(URLError("x"))
        and hub.offline(LocalEntryNotFoundError("x"))
    )
    assert all(hub.offline(kind("x")) for kind in hub.TRANSPORT) and hub.TRANSPORT
    assert not hub.offline(ValueError("x"))
    outer = RuntimeError("could not load")
    outer.__cause__ = TimeoutError()
    assert hub.offline(outer)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda _: True)
    monkeypatch.setattr(hub, "cached", lambda _: None)


@pytest.mark.usefixtures("online")
def test_a_download_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise hub.TRANSPORT[0]("peer closed the connection")

    monkeypatch.setattr("timm.create_model", broken)
    said: list[str] = []
    with pytest.raises(Unreachable, match="cannot be reached"):
        load("test_vit", say=said.append)
    assert said == ["Fetching the weights of test_vit from timm/test_vit.r160_in1k."]


def test_a_damaged_file_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    monkeypatch.setattr(hub, "cached", lambda _: file)
    with pytest.raises(ModelError, match=r"cannot be loaded.*Delete '.*model\.safetensors'"):
        load("test_vit")


@pytest.mark.usefixtures("online")
def test_a_repository_is_described_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architecture": "test_vit", "num_classes": 4, "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    found = hub.described("owner/name@v1")
    assert (found.name, found.num_classes) == ("test_vit", 4)
    assert found.pretrained_cfg["hf_hub_id"] == "owner/name@v1"

    def missing(*_: Any, **__: Any) -> None:
        raise ValueError("no such repository")

    monkeypatch.setattr(hub, "hf_hub_download", missing)
    with pytest.raises(ModelError, match="has no timm model 'owner/name': no such repository"):
        hub.described("owner/name")
