"""What more labels would bring: the curve, its fit, and advice in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick import Quick

from headstart.cli.compare import show
from headstart.comparison.curve import _fit, advice
from headstart.comparison.ledger import At
from headstart.comparison.runner import compare
from headstart.comparison.statistics import Answers, Interval
from headstart.report import figures
from headstart.report.evidence import read


def made(n_test: int, a: float, b: float, *, seed: int = 0, ats: int = 3) -> dict[int, dict[At, Answers]]:
    """Answers whose errors fall as a · n^-b; a picture that was right stays right with more labels."""
    rng = np.random.default_rng(seed)
    sizes: dict[int, dict[At, Answers]] = {n: {} for n in (100, 200, 300, 400)}
    for split in range(ats):
        hard = rng.random(n_test)
        hashes = np.array(sorted(f"{split}-{i:05d}" for i in range(n_test)))
        for n, runs in sizes.items():
            runs[At(split, 0)] = Answers(hard > a * n**-b, hashes)
    return sizes


def test_a_power_law_is_found_again() -> None:
    n = np.array([100.0, 200.0, 300.0, 400.0])
    b, gain = _fit(n, (3.0 * n**-0.5)[None], 600)
    assert b[0] == pytest.approx(0.5)
    assert gain[0] == pytest.approx(3.0 * 400**-0.5 - 3.0 * 600**-0.5)
    flat, none = _fit(n, np.array([[0.1, 0.11, 0.12, 0.13]]), 600)  # more labels never hurt, it says
    assert (flat[0], none[0]) == (0.0, 0.0)


def test_the_interval_holds_the_truth() -> None:
    truth = 3.0 * 400**-0.5 - 3.0 * 600**-0.5
    held, widths = 0, []
    for seed in range(40):
        told = advice(made(400, 3.0, 0.5, seed=seed), None, None)
        assert (told.labels, told.more) == (400, 200)
        held += told.gain.lo <= truth <= told.gain.hi
        widths.append(told.gain.hi - told.gain.lo)
    assert held >= 35
    assert np.mean(widths) < 2 * truth  # and says something


def test_advice_in_words_and_numbers() -> None:
    told = advice(made(400, 3.0, 0.5), "probe", Interval(0.002, -0.006, 0.010))
    assert told.sentence.startswith("200 more labels: about +2.")
    assert told.sentence.endswith("; probe instead: about +0.2 ± 0.8 points.")
    assert json.loads(json.dumps(told.plain()))["more_labels"] == 200
    small = advice({n // 10: runs for n, runs in made(100, 1.0, 0.5).items()}, None, None)
    assert (small.labels, small.more, small.other) == (40, 40, None)


def test_one_repetition_is_told_without_an_interval() -> None:
    told = advice(made(400, 3.0, 0.5, ats=1), "probe", Interval(0.002, -0.006, 0.010))
    assert (told.gain.lo, told.gain.hi, told.other, told.other_gain) == (None, None, None, None)
    assert told.gain.mean > 0
    assert told.sentence.startswith("200 more labels: about +")
    assert "±" not in told.sentence
    assert told.sentence.endswith(" points, by one repetition: how sure that is was not measured.")
    assert told.plain()["gain"] == {"mean": round(told.gain.mean, 6), "lo": None, "hi": None}


def run(out: Path, **more: Any) -> Any:
    asked: dict[str, Any] = {"seeds": 2, "epochs": 3, "executor": Quick()}
    return compare("pictures", "full,probe", out=out, **(asked | more))


def test_the_one_to_take_with_fewer_labels(tmp_path: Path) -> None:
    found = run(tmp_path, learning_curve=True, trials=2)
    curve = found.curve
    (mine,) = curve["curves"]
    assert mine["method"] == found.judgement.take.method
    assert [point["labels"] for point in mine["points"]] == [20, 40, 60, 80]
    assert [point["share"] for point in mine["points"]] == [0.25, 0.5, 0.75, 1.0]
    assert all(point["lo"] <= point["mean"] <= point["hi"] for point in mine["points"])
    assert mine["points"][-1]["mean"] > mine["points"][0]["mean"]
    assert curve["advice"].startswith("80 more labels: about +")
    assert curve["numbers"]["other_method"] in ("full", "probe")
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert sum(",curve,finished" in row for row in rows) == 6
    before = found.judgement
    again = run(tmp_path, learning_curve=True, trials=2)
    assert (again.curve, again.judgement) == (curve, before)
    assert run(tmp_path, trials=2).curve is None


def test_sizes_that_were_asked_for_are_a_curve_of_every_method(tmp_path: Path) -> None:
    found = run(tmp_path, train_sizes=[20, 40, "all"])
    assert [each["method"] for each in found.curve["curves"]] == ["full", "probe"]
    assert [point["labels"] for point in found.curve["curves"][0]["points"]] == [20, 40, 80]
    assert len(found.results) == 4  # the verdict is about the largest


def test_one_seed_claims_no_interval_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, seeds=1, learning_curve=True)
    (mine,) = found.curve["curves"]
    assert [point["labels"] for point in mine["points"]] == [20, 40, 60, 80]
    assert {(point["lo"], point["hi"]) for point in mine["points"]} == {(None, None)}
    numbers = found.curve["numbers"]
    assert (numbers["gain"]["lo"], numbers["gain"]["hi"], numbers["other_gain"]) == (None, None, None)
    show(found)
    said = capsys.readouterr().out
    assert f"Labels:    {found.curve['advice']}" in said
    assert "±" not in said
    figure = figures.learning_curve(read(tmp_path))
    assert figure is not None
    assert all("error_y" not in trace for trace in figure.traces)
    assert {row[-1] for row in figure.rows} == {"not measured"}
    assert "±" not in figure.says


def test_splits_of_unequal_sizes_make_one_curve(tmp_path: Path) -> None:
    """A share of the labels is as many pictures as the split gives: 20 in one, 21 and 22 in the others."""
    found = run(tmp_path, seeds=1, splits=3, executor=Quick(uneven=4), learning_curve=True)
    (mine,) = found.curve["curves"]
    assert [point["labels"] for point in mine["points"]] == [21, 42, 63, 84]
    assert [point["share"] for point in mine["points"]] == [0.25, 0.5, 0.75, 1.0]
    assert {len(point["seeds"]) for point in mine["points"]} == {3}
    assert found.curve["advice"].startswith("80 more labels: about +")
    assert "±" in found.curve["advice"]
    assert found.curve["numbers"]["labels"] == 84


def test_advice_needs_a_repetition_that_is_complete(tmp_path: Path) -> None:
    some = run(tmp_path / "some", seeds=3, executor=Quick(breaks=((0, 20),)), learning_curve=True)
    (mine,) = some.curve["curves"]
    assert [len(point["seeds"]) for point in mine["points"]] == [2, 3, 3, 3]
    assert "±" in some.curve["advice"]
    broken = ((0, 20), (1, 40))
    none = run(tmp_path / "none", executor=Quick(breaks=broken), learning_curve=True)
    assert [len(point["seeds"]) for point in none.curve["curves"][0]["points"]] == [1, 1, 2, 2]
    assert (none.curve["advice"], none.curve["numbers"]) == (None, None)
    assert none.curve["why"] == "No repetition finished with every number of labels, so more are not judged."
    every = tuple((split, size) for split in (0, 1) for size in (20, 40, 60))
    bare = run(tmp_path / "bare", executor=Quick(breaks=every), learning_curve=True)
    assert (bare.curve["curves"], bare.curve["advice"]) == ([], None)
    assert bare.curve["why"].startswith("Nothing finished with fewer labels")


def test_a_share_that_was_asked_for_as_a_number_too_is_one_point(tmp_path: Path) -> None:
    found = run(tmp_path, train_sizes=[20, 50, "all"], learning_curve=True)
    take = found.judgement.take.method
    points = next(each["points"] for each in found.curve["curves"] if each["method"] == take)
    assert [point["labels"] for point in points] == [20, 40, 50, 60, 80]
