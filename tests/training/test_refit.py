"""The last step of a run: once more on train and val, and what is said about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import headstart
from headstart.errors import MethodError, OutputError
from headstart.records import Result, Run
from headstart.ship import run as runs
from headstart.training import refit as room
from headstart.training.events import Reporter
from headstart.training.job import Prepared, execute, prepare
from headstart.training.refit import length, refit


def asked(pictures: Path, model: Path, **fields: Any) -> Prepared:
    given = {"data": str(pictures), "model": str(model), "method": "full", "epochs": 3, "batch_size": 8}
    return prepare(Run.asked(**given | fields), say=lambda _: None)


@pytest.fixture
def prepared(pictures: Path, tiny_model: Path) -> Prepared:
    return asked(pictures, tiny_model)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_from_val_and_says_so(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = execute(prepared, out)
    first, said = weights(out), dict(np.load(out / "predictions.npz"))
    after = refit(prepared, out)
    assert after.refit is not None and after.refit.pictures == 27 and after.refit.epochs == 3
    assert after.model_copy(update={"refit": None}) == before, "the run itself, which is compared, stays"
    assert Result.read(out / "result.json") == after
    assert not same(first, weights(out)) and not (out / "refit").exists()

    arrays = np.load(out / "predictions.npz")
    assert all(np.array_equal(arrays[name], said[name]) for name in said)
    assert after.refit.test is not None and after.refit.test.n == len(arrays["refit_test_labels"]) == 9
    # What is shipped is what was scored.
    finished = runs.of_model(out / "model")
    assert finished is not None
    model = headstart.load(out)
    paths = runs.held_out(finished)
    assert len(paths) == 9, "val is not held out any more"
    of_test = model.calibration.probabilities(np.log(arrays["refit_test_probabilities"]))
    for path, expected in zip(paths, of_test, strict=True):
        row = model.predict(path)[0]
        assert [row.probabilities[name] for name in model.classes] == pytest.approx(list(expected), abs=1e-4)
    assert model.calibration.val is not None and model.calibration.val.n == 6

    text = (out / "model" / "README.md").read_text()
    assert "Weights kept: refitted on train and val (27 pictures) for 3 epochs" in text
    assert "which have learnt from val too" in text and "--refit" in text
    assert refit(prepared, out) == after, "not twice"


def test_it_is_the_same_training_on_more_pictures(prepared: Prepared, tmp_path: Path) -> None:
    """Bit for bit what a run on a split without val would have learnt."""
    from dataclasses import replace

    from headstart.data.splits import joined
    from headstart.training.job import build, place, training_batches
    from headstart.training.loop import fit
    from headstart.training.machine import Machine

    out = tmp_path / "run"
    execute(prepared, out)
    refit(prepared, out)
    wider = replace(prepared, task=replace(prepared.task, split=joined(prepared.task.split)))
    assert set(wider.task.split.index("train")) == {
        *prepared.task.split.index("train"),
        *prepared.task.split.index("val"),
    }
    assert wider.task.split.index("test") == prepared.task.split.index("test")
    method, machine = build(wider), Machine("cpu")
    batches = training_batches(wider, machine)
    place(method, batches, wider, out, machine)
    fit(
        method,
        train=batches,
        val=(),
        plain=wider.task.plain("train"),
        recipe=prepared.recipe,
        epochs=3,
        machine=machine,
    )
    expected = method.export().state_dict()
    assert same(weights(out), {name: value.contiguous() for name, value in expected.items()})


class Stop(Reporter):
    """Interrupts after so many epochs."""

    def __init__(self, after: int) -> None:
        self.left = after

    def epoch(self, record: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_refit_is_gone_on_with(prepared: Prepared, tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    execute(prepared, straight)
    shutil.copytree(straight, cut)
    refit(prepared, straight)
    before = weights(cut)
    with pytest.raises(KeyboardInterrupt):
        refit(prepared, cut, reporter=Stop(2))
    assert same(before, weights(cut)), "until it is done the run ships what it had"
    assert Result.read(cut / "result.json").refit is None
    told: list[str] = []
    reporter = Reporter()
    reporter.say = told.append  # type: ignore[method-assign]
    refit(prepared, cut, reporter=reporter)
    assert "resumed after epoch 2" in told
    assert same(weights(straight), weights(cut))


def test_the_length_that_was_learnt(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = execute(asked(pictures, tiny_model, keep="best", epochs=4), out)
    assert result.kept is not None and result.kept.startswith("best, epoch ")
    best = int(result.kept.rsplit(" ", 1)[1])
    losses = [json.loads(line)["val_log_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert best == 1 + int(np.argmin(losses)) == length(result)
    assert length(result.model_copy(update={"kept": "last"})) == 4


def test_best_on_val_is_what_ships_without_a_refit(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = execute(asked(pictures, tiny_model, keep="best"), out)
    assert f"Weights kept: {result.kept}" in (out / "model" / "README.md").read_text()


def test_what_cannot_be_refitted(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="nothing to refit"):
        refit(prepared, tmp_path / "nowhere")
    out = tmp_path / "run"
    execute(prepared, out)

    def needs_val(_: Prepared) -> Any:
        raise MethodError("full cannot run here: it weighs filters on val")

    monkeypatch.setattr(room, "build", needs_val)
    with pytest.raises(MethodError, match="no validation pictures left in a refit"):
        refit(prepared, out)
    assert Result.read(out / "result.json").refit is None


@pytest.mark.slow
def test_from_python_and_for_the_winner_of_a_comparison(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    one = headstart.train(
        pictures, model=str(tiny_model), method="probe", epochs=1, out=tmp_path / "one", refit=True
    )
    assert one.result.refit is not None and one.result.refit.pictures == 27
    out = tmp_path / "c"
    asked = {"model": str(tiny_model), "epochs": 1, "batch_size": 8, "seeds": 1, "out": out, "refit": True}
    done = headstart.compare(pictures, ["probe", "full"], **asked)
    assert done.judgement.take is not None
    for folder in done.folders:
        refitted = Result.read(folder / "result.json").refit is not None
        assert refitted == (folder.name == done.judgement.take.run)
    assert "refitted" in str(done.best.card["kept"])

    # Its look at the test pictures is one like any other: written down, counted once, and shown.
    def looks() -> int:
        test: dict[str, Any] = json.loads((out / "compare.json").read_text())["test_split"]
        return int(test["looks"])

    assert looks() == 3
    last = json.loads((out / "looks.jsonl").read_text().splitlines()[-1])
    assert last["run"] == f"{done.judgement.take.run}/refit"
    headstart.compare(pictures, ["probe", "full"], **asked)
    assert looks() == 3
    page = done.report().read_text(encoding="utf-8")
    assert "looked at 3 times" in page
    assert "was then trained once more, on training and validation images, and scored a second time" in page
    headstart.compare(pictures, ["probe", "full"], **asked, overwrite=True)
    assert looks() == 6
