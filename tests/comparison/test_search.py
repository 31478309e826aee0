"""Searches: equal for all methods, on val alone, the same again after any kill."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from made_up import Heard
from quick import Quick

from headstart.comparison.runner import Comparison, compare
from headstart.comparison.search import (
    Axis,
    Journal,
    Proposal,
    Study,
    Trial,
    Watch,
    apply,
    axes,
    budget,
    objective,
)
from headstart.errors import ConfigError, OutputError, TrainingError
from headstart.parts.space import Among, Between
from headstart.records import Recipe, Run

RECIPE = Recipe(optimizer="sgd", lr=0.01, weight_decay=1e-4)
AXES = {
    "lr": Axis(Between(0.1, 10.0, log=True), 0.01, factor_of=0.01),
    "alpha": Axis(Between(1e-3, 1.0, log=True, off=0.0), 0.1),
    "kind": Axis(Among("a", "b"), None),
}


def study(journal: Journal | None = None, **more: Any) -> Study:
    asked: dict[str, Any] = {"trials": 8, "seconds": None, "name": "a study"} | more
    return Study("l2-sp", Run(data="x", method="l2-sp", epochs=6), AXES, journal=journal, **asked)


def walk(one: Study, *, until: int = 99, seconds: float = 1.0) -> Study:
    """Do its trials; those near a rate of 0.02 are best."""
    while (proposal := one.next()) is not None and proposal.number < until:
        value = 0.9 - abs(math.log10(proposal.values.get("lr", 0.01) / 0.02)) / 4
        one.tell(
            Trial(
                number=proposal.number,
                kind=proposal.kind,
                state="finished",
                values=proposal.values,
                value=value,
                seconds=seconds,
                steps=[value / 2, value],
            )
        )
    return one


def test_first_as_it_is_then_turned_off_then_sampled_within_the_space() -> None:
    one = walk(study())
    assert [trial.kind for trial in one.over] == ["default", "off", *["sampled"] * 6]
    assert one.over[0].values == {}
    assert one.over[1].values == {"alpha": 0.0}
    for trial in one.over[2:]:
        assert 0.001 <= trial.values["lr"] <= 0.1
        assert 0.001 <= trial.values["alpha"] <= 1.0
        assert trial.values["kind"] in ("a", "b", None)
    assert len({json.dumps(trial.values) for trial in one.over}) == 8


def test_the_best_is_taken_and_the_earliest_of_equals() -> None:
    one = walk(study())
    best = one.chosen
    assert best is not None
    assert best.value == max(trial.value or 0 for trial in one.over)
    tied = walk(study(trials=1))
    tied.over.append(tied.over[0].model_copy(update={"number": 1}))
    assert tied.chosen is tied.over[0]


def test_a_study_that_was_stopped_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    whole = walk(study(Journal(tmp_path / "whole" / "journal.log")))
    for until in range(1, 8):
        part = walk(study(Journal(tmp_path / "part" / "journal.log")), until=until)
        assert part.over == whole.over[:until]
    assert walk(study(Journal(tmp_path / "part" / "journal.log"))).over == whole.over
    assert walk(study(name="another")).over[2:] != whole.over[2:]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_half_a_line_in_the_journal_costs_that_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.log"
    whole = walk(study(Journal(path)))
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    (tmp_path / "journal.log.lock").write_text("left behind by a kill")
    again = study(Journal(path))
    assert again.over == whole.over[:7]
    assert walk(again).over == whole.over
    assert study(Journal(path)).over == whole.over


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_text('{"op_code": 0, "worker_id": "x", "study_name": 1}\n[]\n')
    with pytest.raises((OutputError, TypeError, KeyError)):
        study(Journal(path))


def test_a_budget_ends_a_search_before_it_is_passed() -> None:
    assert len(walk(study(trials=None, seconds=5.0)).over) == 5
    assert len(walk(study(trials=3, seconds=5.0)).over) == 3
    small = walk(study(trials=None, seconds=1.5))
    assert len(small.over) == 1
    assert small.too_small
    assert not walk(study(trials=1)).too_small
    assert not walk(study(trials=None, seconds=2.0)).too_small


def failed(number: int, seconds: float = 0.5) -> Trial:
    return Trial(number=number, kind="sampled", state="failed", values={}, seconds=seconds, reason="No.")


def test_a_search_is_given_up_after_three_failures_in_a_row() -> None:
    one = study(trials=None, seconds=100.0)
    for number in (0, 1):
        one.tell(failed(number))
    assert one.next() is not None
    one = walk(one, until=3)  # one that works begins the count anew
    for number in (3, 4):
        one.tell(failed(number))
    assert one.next() is not None and not one.given_up
    one.tell(failed(5))
    assert one.next() is None and one.given_up
    assert one.chosen is one.over[2]
    assert one.plain()["given_up"] is True


def test_failed_trials_spend_the_budget_too() -> None:
    one = study(trials=None, seconds=2.0)
    one.tell(failed(0, seconds=1.5))
    assert one.next() is None and one.too_small


@pytest.mark.parametrize(
    ("given", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("2h", 7200), ("1h30m", 5400), (12.5, 12.5)]
)
def test_budgets(given: Any, seconds: float) -> None:
    assert budget(given) == seconds
    assert budget(None) is None


@pytest.mark.parametrize("given", ["", "soon", "0", -1, "1d", True, "h", "1..5h", float("nan")])
def test_what_is_no_budget(given: Any) -> None:
    with pytest.raises(ConfigError, match="such as 90s"):
        budget(given)


def test_shared_axes_are_alike_and_what_was_asked_for_is_no_axis() -> None:
    space = Between(0.0, 1.0)
    hyper = {"alpha": (0.1, space), "beta": (1.0, None)}
    run = Run(data="x", method="l2-sp")
    assert set(axes(run, RECIPE, takes_steps=True, hyper=hyper)) == {"lr", "weight_decay", "alpha"}
    assert set(axes(run, RECIPE, takes_steps=False, hyper=hyper)) == {"alpha"}
    asked = Run(data="x", method="l2-sp", lr=0.1, hyper={"alpha": 3.0})
    assert set(axes(asked, RECIPE, takes_steps=True, hyper=hyper)) == {"weight_decay"}
    none = RECIPE.model_copy(update={"weight_decay": 0.0})
    assert set(axes(run, none, takes_steps=True, hyper={})) == {"lr"}


def test_values_go_where_they_belong() -> None:
    run = apply(Run(data="x", method="l2-sp", hyper={"beta": 1}), {"lr": 0.3, "alpha": 0.0})
    assert (run.lr, run.hyper) == (0.3, {"beta": 1, "alpha": 0.0})
    assert not run.trial
    assert Proposal(0, "default", {}).of(run).trial


def test_accuracy_decides_and_log_loss_among_equals() -> None:
    assert objective(0.8, 0.5) > objective(0.8, 0.6) > objective(0.8, 500.0) > objective(0.8 - 1e-4, 0.1)


def test_a_trial_below_the_median_is_stopped_after_a_third_of_its_epochs() -> None:
    watch = Watch(((0.5, 0.6, 0.7), (0.4, 0.5, 0.6), (0.5, 0.6, 0.7)), 6)
    assert watch.stops_at([0.1]) is None
    assert watch.stops_at([0.1, 0.1]) is None  # a third: still warming up
    assert watch.stops_at([0.1, 0.1, 0.1]) == 3
    assert watch.stops_at([0.1, 0.1, 0.9]) is None
    assert Watch(watch.earlier[:1], 6).stops_at([0.1] * 5) is None  # nothing to be worse than


# ---------------------------------------------------------------------- in a comparison


class Fails(Quick):
    """Takes its time, and fails before the first epoch."""

    def execute(self, prepared: Any, folder: Path, **more: Any) -> Any:
        folder.mkdir(exist_ok=True)
        time.sleep(self.pause)
        raise TrainingError("It fails.")


def run(out: Path, **more: Any) -> Comparison:
    asked: dict[str, Any] = {"methods": "full,l2-sp,probe", "seeds": 2, "splits": 1, "epochs": 6}
    asked |= {"executor": Quick()}
    return compare("pictures", out=out, **(asked | more))


def test_every_method_has_the_same_trials_and_finals_take_the_best(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, trials=4)
    searched = json.loads((out / "search.json").read_text())
    assert [study["method"] for study in searched["studies"]] == ["full", "l2-sp", "probe"]
    for each in searched["studies"]:
        assert len(each["trials"]) == 4
        assert set(each["axes"]) >= (set() if each["method"] == "probe" else {"lr", "weight_decay"})
        best = each["trials"][each["chosen"]]
        for path in (out / "runs").glob(f"{each['method']}-*/result.json"):
            result = json.loads(path.read_text())
            if not result["run"]["trial"]:
                assert result["run"]["lr"] == best["values"].get("lr")
                assert result["run"]["hyper"] == {
                    name: value
                    for name, value in best["values"].items()
                    if name not in ("lr", "weight_decay")
                }
    asked = json.loads((out / "compare.json").read_text())
    assert {each["trials"] for each in asked["spent"].values()} == {4}


def test_trials_never_look_at_the_test_pictures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, trials=3)
    results = [json.loads(path.read_text()) for path in out.glob("runs/*/result.json")]
    trials = [result for result in results if result["run"]["trial"]]
    assert len(trials) == 9
    assert all(result["test"] is None for result in trials)
    (test,) = json.loads((out / "compare.json").read_text())["test"]
    assert test["looks"] == 6  # three methods, two seeds
    assert len(test["hash"]) == 64
    run(out, trials=3)
    assert json.loads((out / "compare.json").read_text())["test"][0] == test
    run(out, trials=3, overwrite=True)
    assert json.loads((out / "compare.json").read_text())["test"][0]["looks"] == 12


def test_a_budget_that_is_too_small_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(out, budget="2s", methods="full,probe")  # a trial takes a second and a half
    assert found.judgement.notes == [
        f"The budget of 2 s per method is too small for a second trial of {method}, which stays as it is."
        for method in ("full", "probe")
    ]
    spent = json.loads((out / "compare.json").read_text())["spent"]
    assert spent == {method: {"trials": 1, "seconds": 1.5} for method in ("full", "probe")}


def test_a_first_trial_that_takes_longer_than_the_budget_is_finished_and_said(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(out, budget="1s", methods="full")
    assert found.judgement.notes == [
        "The budget of 1 s per method is too small for a second trial of full, which stays as it is. "
        "Its first took longer than that, and was let run to its end."
    ]
    (only,) = json.loads((out / "search.json").read_text())["studies"]
    assert (only["seconds"], only["chosen"], only["given_up"]) == (1.5, 0, False)
    assert [trial["state"] for trial in only["trials"]] == ["finished"]
    found = run(tmp_path / "two", budget="2s", methods="full", splits=2)
    assert found.judgement.notes == [
        "The budget of 2 s per method, 1 s for each of its 2 searches, is too small for a second trial "
        "of full in one of them or more; there it stays as it is. Its first took longer than that, and "
        "was let run to its end."
    ]


@pytest.mark.parametrize("asked", [{"budget": "1h"}, {"trials": 8}])
def test_a_method_whose_trials_fail_is_searched_no_further(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Before their first epoch, so that no record says how long they took."""
    out, heard = tmp_path / "out", Heard()
    found = run(out, methods="l2-sp", executor=Fails(pause=0.05), reporter=heard, **asked)
    (study,) = json.loads((out / "search.json").read_text())["studies"]
    assert [trial["state"] for trial in study["trials"]] == ["failed"] * 3
    assert all(0.05 <= trial["seconds"] < 10 for trial in study["trials"])
    assert study["given_up"] and study["chosen"] is None
    said = (
        "A search for l2-sp was given up: 3 trials in a row failed. "
        "To search anew, delete study/journal.log in the comparison's folder. The last of them: It fails."
    )
    assert said in heard.lines and found.judgement.notes == [said]
    assert {failure.reason for failure in found.failed} == {"It fails."}
    assert heard.runs[-1][1:] == (5, 5)  # three trials and the two runs of the table
    again = run(out, methods="l2-sp", executor=Fails(pause=0.05), **asked)
    assert again.judgement == found.judgement
    (out / "study" / "journal.log").unlink()
    mended = run(out, methods="l2-sp", trials=4)
    assert len(mended.results) == 2 and mended.judgement.notes == []


def test_each_split_and_size_is_searched_on_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, methods="full", splits=2, train_sizes=[20, "all"], seeds=1, trials=2)
    studies = json.loads((out / "search.json").read_text())["studies"]
    assert sorted((s["split"], s["train_size"] or 0) for s in studies) == [(0, 0), (0, 20), (1, 0), (1, 20)]
    sizes = json.loads((out / "sizes.json").read_text())
    assert [size["train_size"] for size in sizes] == [20, None]


@pytest.mark.parametrize("trials", [0, -1, True, "four"])
def test_trials_are_a_number(tmp_path: Path, trials: Any) -> None:
    with pytest.raises(ConfigError, match="trials is how many"):
        run(tmp_path / "out", trials=trials)


def test_a_method_that_cannot_run_here_is_skipped_and_no_failure(tmp_path: Path) -> None:
    for more in ({}, {"trials": 2}):
        found = run(tmp_path / f"out{len(more)}", executor=Quick(unfit=("l2-sp",)), **more)
        assert found.failed == []
        rows = (tmp_path / f"out{len(more)}" / "results.csv").read_text().splitlines()
        assert sum("skipped,no filters" in row for row in rows) == 2
