import ast
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import headstart.ship
from headstart.data.preprocess import Preprocess
from headstart.errors import ModelError
from headstart.ship import bundle
from headstart.ship.find import find
from headstart.ship.predict import Predictor, load

CLASSES = ["red", "green", "blue"]


class Brightest(nn.Module):
    """Says which channel is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((2, 3))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "model"
    bundle.save(folder, Brightest(), config=None, preprocess=Preprocess(size=16), classes=CLASSES, card={})
    return folder


@pytest.fixture
def predictor(model: Path) -> Predictor:
    return load(model, net=Brightest(), device="cpu")


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path)
    return path


def test_one_picture(predictor: Predictor, tmp_path: Path) -> None:
    (said,) = predictor.predict(picture(tmp_path / "a.png", (0, 250, 0)))
    assert said.label == "green" and said.error is None and said.path == str(tmp_path / "a.png")
    assert said.probability == said.probabilities["green"] > 0.9
    assert list(said.probabilities.values()) == sorted(said.probabilities.values(), reverse=True)
    assert abs(sum(said.probabilities.values()) - 1) < 1e-5
    assert json.loads(json.dumps(said.as_dict()))["label"] == "green"


def test_the_same_numbers_as_at_evaluation(predictor: Predictor, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.png"
    Image.fromarray(rng.integers(0, 255, (40, 25, 3), dtype=np.uint8)).save(path)
    plain = torch.from_numpy(predictor.preprocess.plain(Image.open(path))).permute(2, 0, 1)[None]
    expected = predictor.net(predictor.preprocess.normalise(plain)).softmax(1)[0].tolist()
    said = predictor.predict(path)[0].probabilities
    assert [said[name] for name in CLASSES] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_many_in_order_with_broken_ones_between(
    batch_size: int, predictor: Predictor, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    given = [
        picture(tmp_path / "r.png", (250, 0, 0)),
        tmp_path / "text.jpg",
        picture(tmp_path / "b.png", (0, 0, 250)),
        tmp_path / "nowhere.png",
        tmp_path / "empty.png",
        picture(tmp_path / "g.png", (0, 250, 0)),
    ]
    rows = predictor.predict(given, batch_size=batch_size)
    assert [row.path for row in rows] == [str(path) for path in given]
    assert [row.label for row in rows] == ["red", None, "blue", None, None, "green"]
    assert [row.error is None for row in rows] == [True, False, True, False, False, True]
    assert "text" in str(rows[1].error) and "does not exist" in str(rows[3].error)
    assert rows[1].probability is None and rows[1].probabilities == {}


def test_folders_are_walked(predictor: Predictor, tmp_path: Path) -> None:
    root = tmp_path / "album"
    picture(root / "b.png", (0, 0, 250))
    picture(root / "sub" / "a.JPG", (250, 0, 0))
    picture(root / ".hidden" / "c.png", (250, 0, 0))
    (root / "notes.txt").write_text("x")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    rows = predictor.predict([root, root / "b.png"])
    assert [Path(row.path).name for row in rows] == ["b.png", "broken.jpg", "a.JPG", "b.png"]
    assert [row.label for row in rows] == ["blue", None, "red", "blue"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "album").symlink_to(root)
    (root / "sub" / "up").symlink_to(root)  # leads back up: walked once
    linked = predictor.predict(tmp_path / "links")
    assert [Path(row.path).name for row in linked] == ["b.png", "broken.jpg", "a.JPG"]
    (empty,) = predictor.predict(tmp_path / "run")
    assert empty.error == "no pictures in this folder"
    assert predictor.predict([]) == []


def test_a_pipe_in_a_folder_is_not_waited_for(predictor: Predictor, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert [row.error for row in predictor.predict(tmp_path)] == ["is no file but a pipe or a socket"]


def test_a_folder_without_permission_is_a_row(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(top: Any, onerror: Any = None, **_: Any) -> Any:
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    monkeypatch.setattr(os, "walk", refuse)
    (row,) = predictor.predict(tmp_path)
    assert row.error == "the folder cannot be read: Permission denied"


def test_impossible_wishes(predictor: Predictor, model: Path) -> None:
    with pytest.raises(ModelError, match="batch_size"):
        predictor.predict([], batch_size=0)
    with pytest.raises(ModelError, match="device 'abacus'"):
        load(model, net=Brightest(), device="abacus")


# -- where the model is


def result(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(fields))


def test_folders_that_lead_to_the_model(model: Path, tmp_path: Path) -> None:
    run = model.parent
    result(run, status="finished")
    assert find(run) == find(model) == find(model / "model.safetensors") == model
    compare = tmp_path / "compare"
    (compare / "runs").mkdir(parents=True)
    run.rename(compare / "runs" / "0a1b")
    (compare / "verdict.json").write_text(json.dumps({"take": {"run": "0a1b", "method": "full"}}))
    assert find(compare) == compare / "runs" / "0a1b" / "model"
    assert load(compare, net=Brightest()).classes == CLASSES


@pytest.mark.parametrize(
    ("status", "message"),
    [("failed", "it has failed. The loss was NaN"), ("interrupted", "interrupted; go on with --resume")],
)
def test_runs_that_are_not_finished(status: str, message: str, model: Path) -> None:
    result(model.parent, status=status, reason="The loss was NaN.")
    with pytest.raises(ModelError, match=message):
        find(model.parent)


def test_what_is_missing_is_said(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ModelError, match="There is no folder"):
        find(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        find(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        find(tmp_path / "empty")
    (tmp_path / "going" / "runs").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no verdict\.json"):
        find(tmp_path / "going")
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "last.pt").write_bytes(b"")
    with pytest.raises(ModelError, match="not finished"):
        find(tmp_path / "started")
    result(tmp_path / "bare", status="finished")
    with pytest.raises(ModelError, match="missing or incomplete"):
        find(tmp_path / "bare")
    (model.parent / "result.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        find(model.parent)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ("[]", "an object is expected"),
        ("{}", "takes no run"),
        ('{"take": null}', "takes no run"),
        ('{"take": {"run": 3}}', "takes no run"),
        ('{"take": {"run": "gone"}}', "not under runs/"),
        ('{"take": {"run": "../run"}}', "not under runs/"),
    ],
)
def test_verdicts_that_lead_nowhere(verdict: str, message: str, tmp_path: Path, model: Path) -> None:
    compare = tmp_path / "compare"
    (compare / "runs").mkdir(parents=True)
    (compare / "verdict.json").write_text(verdict)
    with pytest.raises(ModelError, match=message):
        find(compare)


def test_prediction_needs_no_training_code() -> None:
    """Nothing in this room imports the method, its methods, or the loop."""
    folder = Path(headstart.ship.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith(
                    ("headstart.method", "headstart.training", "headstart.comparison", "headstart.registry")
                ), f"{file.name} imports {name}"
