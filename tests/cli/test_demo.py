"""The demo from end to end on a few small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typed import Typed, save_tiny_net, typing

from headstart.cli import demo
from headstart.data import catalogue
from headstart.errors import Unreachable


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    net = save_tiny_net(tmp_path_factory.mktemp("net"))
    quick = {"methods": "probe,full", "seeds": 1, "model": str(net), "img_size": 32, "epochs": 1}
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS | quick)
    monkeypatch.setattr(demo, "PER_CLASS", 8)


def test_where_clipart_cannot_be_had(
    typed: Typed, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, tried = catalogue.fetch, []

    def offline(name: str, out: Path, **more: Any) -> Path:
        tried.append(name)
        if name == "clipart":
            raise Unreachable("Tried apt-get.")
        return fetch(name, out, **more)

    monkeypatch.setattr(catalogue, "fetch", offline)
    out = tmp_path / "demo"
    ended = typed("demo", "--out", out)
    assert ended.code == 0, ended.err
    assert "clipart cannot be had: Tried apt-get.\nUsing handwritten digits instead." in ended.err
    assert "Verdict:" in ended.out and "headstart predict compared NEW-PHOTOS" in ended.out
    shown = [line for line in ended.out.splitlines() if "  says " in line]
    assert len(shown) == demo.SHOWN
    for line in shown:  # what it really is stands in the folder's name
        path, _, said = line.strip().partition("  says ")
        assert said.endswith(f", is {Path(path.strip()).parent.name}")
        assert Path(path.strip()).is_file()

    # The second time nothing is fetched and nothing trained.
    before = {path: path.stat().st_mtime_ns for path in out.glob("compared-*/runs/*/result.json")}
    again = typed("demo", "--out", out)
    assert again.code == 0
    assert tried == ["clipart", "digits", "digits"]
    assert "epoch" not in again.err.replace("1 epochs", "")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.out == ended.out


def test_the_settings_fit_the_pictures() -> None:
    assert sum(demo.SPLIT) == pytest.approx(1)
    assert demo.SETTINGS["epochs"] == demo.EPOCHS
    assert demo.SPLIT[0] * 10 * demo.PER_CLASS == pytest.approx(300)
