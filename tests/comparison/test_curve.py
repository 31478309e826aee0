"""What more labels would bring: the curve, its fit, and advice in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick import Quick

from headstart.comparison.curve import _fit, advice
from headstart.comparison.ledger import At
from headstart.comparison.runner import compare
from headstart.comparison.statistics import Answers, Interval


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
