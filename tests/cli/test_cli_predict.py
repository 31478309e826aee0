"""`headstart predict` on many pictures: files of rows, interruptions, names on stdin, explanations."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typed import Typed, typing

from headstart.data.picture import open_picture
from headstart.data.preprocess import Preprocess
from headstart.nets.architecture import Architecture
from headstart.ship import bundle
from headstart.ship.calibration import Calibration

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


def save(folder: Path, seed: int = 0, calibration: Calibration | None = None) -> Path:
    torch.manual_seed(seed)
    config = Architecture("test_resnet", 3)
    bundle.save(
        folder,
        config.build(),
        config=config,
        preprocess=Preprocess(size=32),
        classes=CLASSES,
        card={},
        calibration=calibration,
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "5.png").write_text("no picture")
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_unsure_is_said_in_every_format(typed: Typed, album: Path, tmp_path: Path) -> None:
    never = save(tmp_path / "never", calibration=Calibration(threshold=None, wanted=0.95))
    always = save(tmp_path / "always", calibration=Calibration(threshold=0.0))
    for folder, unsure in ((never, True), (always, False)):
        table = typed("predict", folder, album).out.splitlines()
        assert [line.endswith("unsure") for line in table] == [unsure and i != 5 for i in range(10)]
        rows = list(csv.DictReader(io.StringIO(typed("predict", folder, album, "--format", "csv").out)))
        said = str(unsure).lower()
        assert [row["unsure"] for row in rows] == [said if i != 5 else "" for i in range(10)]
        lines = typed("predict", folder, album, "--format", "jsonl").out.splitlines()
        assert [json.loads(line)["unsure"] for line in lines] == [unsure and i != 5 for i in range(10)]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_an_interrupted_file_is_gone_on_with(ending: str, typed: Typed, model: Path, album: Path) -> None:
    whole, cut = album.parent / f"whole.{ending}", album.parent / f"cut.{ending}"
    assert typed("predict", model, album, "--out", whole).code == 0
    content = whole.read_bytes()
    assert b"cannot be" not in content and b"text file" in content, "broken files are reported in place"
    for size in (0, 3, len(content) // 3, 2 * len(content) // 3, len(content) - 1, len(content)):
        cut.write_bytes(content[:size])
        ended = typed("predict", model, album, "--out", cut, "--resume")
        assert ended.code == 0, ended.err
        got, wanted = rows_of(cut), rows_of(whole)
        assert len(got) == len(wanted) == 10, f"cut at {size}"
        for mine, theirs in zip(got, wanted, strict=True):  # a smaller batch rounds otherwise
            assert (mine["path"], mine["label"], mine["error"]) == (
                theirs["path"],
                theirs["label"],
                theirs["error"],
            )
            assert float(mine["probability"] or 0) == pytest.approx(
                float(theirs["probability"] or 0), abs=1e-5
            )
    assert "0 rows" in ended.err and "10 were there before" in ended.err
    # New pictures in the folder are added by the same command.
    Image.new("RGB", (9, 9)).save(album / "z.png")
    assert "1 rows" in typed("predict", model, album, "--out", cut, "--resume").err
    assert rows_of(cut)[-1]["path"] == str(album / "z.png") and len(rows_of(cut)) == 11


def test_rows_are_never_mixed_or_lost(typed: Typed, model: Path, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert typed("predict", model, album, "--out", out).code == 0
    kept = out.read_bytes()
    assert "--resume" in typed("predict", model, album, "--out", out).refusal
    other = save(tmp_path / "other", seed=1)
    assert "rows of another model" in typed("predict", other, album, "--out", out, "--resume").refusal
    refused = typed("predict", model, album, "--out", out, "--resume", "--top", 2).refusal
    assert "other columns" in refused
    assert out.read_bytes() == kept
    (tmp_path / "thesis.jsonl").write_text("mine\n")
    refused = typed("predict", model, album, "--out", tmp_path / "thesis.jsonl", "--resume").refusal
    assert "holds no rows of headstart predict" in refused
    assert (tmp_path / "thesis.jsonl").read_text() == "mine\n"
    assert typed("predict", other, album, "--out", out, "--overwrite").code == 0
    assert out.read_bytes() != kept
    assert "give it with --out" in typed("predict", model, album, "--resume").refusal
    assert "for the terminal" in typed("predict", model, album, "--out", out, "--format", "table").refusal
    refused = typed("predict", model, album, "--out", tmp_path / "no" / "where.csv").refusal
    assert "cannot be written" in refused


def test_names_on_stdin(
    typed: Typed, model: Path, album: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = tmp_path / "with  spaces, and 'quotes'.png"
    Image.new("RGB", (9, 9)).save(odd)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{album / '1.png'}\n\n{odd}\n{album}\n"))
    rows = list(csv.DictReader(io.StringIO(typed("predict", model, "-", "--format", "csv").out)))
    assert [row["path"] for row in rows[:3]] == [str(album / "1.png"), str(odd), str(album / "0.png")]
    assert len(rows) == 12


def test_a_killed_process_loses_nothing(model: Path, tmp_path: Path) -> None:
    album = tmp_path / "album"
    album.mkdir()
    Image.new("RGB", (64, 64), (90, 10, 200)).save(album / "0000.png")
    for i in range(1, 800):
        os.link(album / "0000.png", album / f"{i:04d}.png")
    out = tmp_path / "rows.csv"
    words = [
        sys.executable,
        "-m",
        "headstart",
        "predict",
        str(model),
        str(album),
        "--out",
        str(out),
        "--resume",
    ]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 2000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before.count(b"\n") > 1
    assert subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0
    assert out.read_bytes().startswith(before)
    with out.open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert paths == [str(album / f"{i:04d}.png") for i in range(800)]


def test_explanations(typed: Typed, model: Path, album: Path, tmp_path: Path) -> None:
    why = tmp_path / "why"
    ended = typed("predict", model, album, "--format", "jsonl", "--explain", why)
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert rows[5]["explanation"] == "" and len(list(why.iterdir())) == 9
    assert all(open_picture(row["explanation"]).size == (32, 32) for row in rows if row["explanation"])
    refused = typed("predict", model, album, "--engine", "onnx", "--explain", why).refusal
    assert "leave --engine out" in refused


def test_engines_that_are_not_there(typed: Typed, model: Path, album: Path) -> None:
    assert "Did you mean 'onnx'?" in typed("predict", model, album, "--engine", "onyx").refusal
    assert "has no model.onnx" in typed("predict", model, album, "--engine", "onnx").refusal
