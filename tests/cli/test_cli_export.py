"""`headstart export` as it is typed, and `train --refit` before it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typed import Typed, save_tiny_net, typing

from headstart.ship import export as room
from headstart.ship.formats import NotWritten


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


def test_train_refit_export_predict(typed: Typed, pictures: Path, tmp_path: Path) -> None:
    net, out, bundle = save_tiny_net(tmp_path / "net"), tmp_path / "run", tmp_path / "bundle"
    words = ("train", pictures, "--model", net, "--img-size", 32, "--method", "probe", "--epochs", 1)
    ended = typed(*words, "--out", out, "--refit")
    assert ended.code == 0, ended.err
    assert "refitted on train and val (27 pictures) for 1 epochs: test accuracy" in ended.out
    again = typed(*words, "--out", out, "--refit", "--resume")
    assert again.code == 0 and "refitted already" in again.err

    ended = typed("export", out, "--out", bundle, "--format", "safetensors", "--push", "me/ants", "--dry-run")
    assert ended.code == 0, ended.err
    assert "Verified with 9 pictures only" in ended.err, "a refit has learnt from val"
    assert re.search(r"Verified model\.safetensors: 9 of 9 labels agree", ended.out)
    assert "Would be sent to https://huggingface.co/me/ants:" in ended.out
    assert "refitted on train and val" in (bundle / "README.md").read_text()
    assert typed("predict", bundle, pictures, "--format", "csv").code == 0

    record = json.loads(typed("export", out, "--out", bundle, "--format", "safetensors", "--json").out)
    assert record["folder"] == str(bundle) and record["not_written"] == {} and record["push"] is None
    assert set(record["verified"]) == {"timm", "model.safetensors"}
    assert record["calibration"]["wanted"] == 0.95


def test_a_format_that_could_not_be_written_is_2(
    typed: Typed, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, out, bundle = save_tiny_net(tmp_path / "net"), tmp_path / "run", tmp_path / "bundle"
    words = ("train", pictures, "--model", net, "--img-size", 32, "--method", "probe", "--epochs", 1)
    assert typed(*words, "--out", out).code == 0

    def cannot(*_: object, **__: object) -> None:
        raise NotWritten("ONNX", "the operation x has no ONNX form; it is in the layer 'y' (Z).")

    monkeypatch.setattr(room, "to_onnx", cannot)
    ended = typed("export", out, "--out", bundle, "--format", "safetensors,onnx", "--with-preprocessing")
    assert ended.code == 2
    assert "model.onnx was not written: the operation x has no ONNX form; it is in the layer 'y'" in ended.err
    assert (bundle / "model.safetensors").is_file() and not (bundle / "model.onnx").exists()
    assert "model.onnx: not written. the operation x" in (bundle / "README.md").read_text()


def test_mistakes(typed: Typed, tmp_path: Path) -> None:
    assert "--out" in typed("export", tmp_path).refusal
    assert "belong to --push" in typed("export", tmp_path, "--out", tmp_path / "x", "--dry-run").refusal
    refused = typed("export", tmp_path, "--out", tmp_path / "x", "--push", "nobody").refusal
    assert "Give OWNER/NAME" in refused
    assert "holds no model" in typed("export", tmp_path, "--out", tmp_path / "x").refusal
    refused = typed("export", tmp_path, "--out", tmp_path / "x", "--format", "onyx").refusal
    assert "Did you mean 'onnx'?" in refused
