from __future__ import annotations

from pathlib import Path

import pytest
from made_up import MadeUp

from headstart.comparison.ledger import Entry
from headstart.comparison.runner import Comparison, compare
from headstart.comparison.statistics import wilson
from headstart.comparison.verdict import Verdict, judge, read
from headstart.errors import TrainingError
from headstart.records import Run


def judged(tmp_path: Path, world: MadeUp, methods: str = "probe,full,lp-ft", seeds: int = 3) -> Comparison:
    return compare("pictures", methods, out=tmp_path / "out", seeds=seeds, executor=world)


def test_a_tie_takes_the_cheapest(tmp_path: Path) -> None:
    found = judged(tmp_path, MadeUp(exact=True))
    assert found.verdict.startswith(
        "Tie: probe, full and lp-ft can't be told apart on the 3 splits' 150 test pictures each; take the "
        "cheapest, probe (4.0 s against 61 s of full). Differences below about "
    )
    assert found.judgement.take is not None
    assert found.judgement.take.method == "probe"
    assert [row["call"] for row in found.table] == ["no evidence", "baseline", "no evidence"]


def test_one_test_split_for_all_seeds_is_said_as_such(tmp_path: Path) -> None:
    found = judged(tmp_path, MadeUp(exact=True, one_split=True))
    assert "on these 150 test pictures;" in found.verdict
    assert found.judgement.distinct_test == 150
    assert found.judgement.n_test == [150, 150, 150]


def test_a_real_difference_is_named_with_its_interval_and_its_time(tmp_path: Path) -> None:
    world = MadeUp(exact=True, n=400)
    world.right |= {"probe": 0.6, "full": 0.8, "lp-ft": 0.9}
    found = judged(tmp_path, world)
    assert found.verdict.startswith("Take lp-ft: +10.0 points over full (95 % interval +")
    assert found.verdict.endswith("), at 1.1x its time.")
    row = {row["method"]: row for row in found.table}
    assert row["lp-ft"]["difference"]["mean"] == pytest.approx(0.1)
    assert row["lp-ft"]["difference"]["lo"] > 0
    assert row["lp-ft"]["accuracy"]["lo"] < 0.9 < row["lp-ft"]["accuracy"]["hi"]
    assert [row[m]["call"] for m in ("probe", "full", "lp-ft")] == ["hurts", "baseline", "helps"]
    assert found.judgement.take is not None
    assert found.judgement.take.method == "lp-ft"


def test_the_baseline_may_be_the_one_to_take(tmp_path: Path) -> None:
    world = MadeUp(exact=True, n=400)
    world.right |= {"probe": 0.6, "full": 0.9, "lp-ft": 0.7}
    found = judged(tmp_path, world)
    assert found.verdict.startswith(
        "Take full (61 s a run): every other method is worse on the 3 splits' 400 test pictures each. "
        "probe is worse: -30.0"
    )


@pytest.mark.parametrize("seeds_of_probe", [{0, 1}, {0, 1, 2}])
def test_nothing_is_said_of_methods_that_share_no_repetition(
    tmp_path: Path, seeds_of_probe: set[int]
) -> None:
    seeds = {"probe": seeds_of_probe, "full": {2, 3}, "lp-ft": {0, 1}}

    def before(run: Run) -> None:
        if run.seed not in seeds[run.method]:
            raise TrainingError("Out of memory.")

    world = MadeUp(exact=True, n=400, before=before)
    world.right |= {"probe": 0.9, "full": 0.6, "lp-ft": 0.7}
    found = judged(tmp_path, world, seeds=4)
    assert found.verdict.startswith("Take probe")
    if seeds_of_probe == {0, 1}:
        assert found.verdict.startswith(
            "Take probe, the best on validation (4.0 s a run). lp-ft is worse: -20.0 "
        )
        assert found.verdict.endswith(" full finished no repetition together with it: not compared.")
    else:
        assert "not compared" not in found.verdict


def test_the_test_split_has_no_say_in_what_is_taken(tmp_path: Path) -> None:
    world = MadeUp(exact=True, n=400)
    world.right |= {"probe": 0.9, "full": 0.6}
    world.val_right = {"probe": 0.6, "full": 0.9}
    found = judged(tmp_path, world, "probe,full")
    assert found.judgement.take is not None
    assert found.judgement.take.method == "full"
    assert (
        "Take full, the best on validation (61 s a run). But on the 3 splits' 400 test pictures each probe "
        "is better: +30.0 points (95 % interval +" in found.verdict
    )


def test_a_tie_on_test_that_validation_settles(tmp_path: Path) -> None:
    world = MadeUp(exact=True, n=300)
    world.val_right = {"probe": 0.6}
    found = judged(tmp_path, world, "probe,full")
    assert (
        "Take full (61 s a run): on validation, full is better than the cheaper probe (4.0 s a run)."
        in found.verdict
    )
    assert "take the cheapest" not in found.verdict


def test_a_tie_with_something_worse_beside_it(tmp_path: Path) -> None:
    world = MadeUp(exact=True, n=300)
    found = judged(tmp_path, world, "probe,full,scratch")
    assert "Tie: probe and full can't" in found.verdict
    assert "scratch is worse: -40.0 points (95 % interval -" in found.verdict


def test_no_difference_is_claimed_whose_interval_holds_zero(tmp_path: Path) -> None:
    for n in (1, 2, 30, 150):
        world = MadeUp(exact=True, n=n)
        world.right |= {"lp-ft": 0.82}
        found = judged(tmp_path / str(n), world, "full,lp-ft", seeds=2)
        row = found.table[1]
        assert row["difference"]["lo"] <= 0 <= row["difference"]["hi"]
        assert row["call"] == "no evidence"
        assert "Tie: full and lp-ft" in found.verdict


def test_the_shipped_run_is_the_best_on_validation_of_its_method(tmp_path: Path) -> None:
    found = judged(tmp_path, MadeUp(), "probe", seeds=5)
    assert found.judgement.take is not None
    best = max(found.results, key=lambda result: result.val.accuracy if result.val else 0)
    assert found.judgement.take.seed == best.seed
    assert (found.folder / "runs" / found.judgement.take.run / "result.json").is_file()
    assert found.verdict.startswith("Only probe finished (4.0 s a run): ")
    assert "for this model" not in found.verdict
    one = judged(tmp_path / "one", MadeUp(), "probe", seeds=1)
    assert ", of this model), with nothing to compare it with." in one.verdict


def test_a_cost_that_nobody_knows_is_not_told(tmp_path: Path) -> None:
    worlds = {
        "only": ("probe", MadeUp(exact=True)),
        "worse": ("probe,full", MadeUp(exact=True, right={"probe": 0.4, "full": 0.8})),
        "tie": ("probe,full", MadeUp(exact=True)),
        "overruled": (
            "probe,full",
            MadeUp(
                exact=True, n=400, right={"probe": 0.9, "full": 0.6}, val_right={"probe": 0.6, "full": 0.9}
            ),
        ),
    }
    for seeds in (1, 2):
        for name, (methods, world) in worlds.items():
            world.seconds = dict.fromkeys(world.seconds, 0.0)
            found = judged(tmp_path / f"{name}{seeds}", world, methods, seeds=seeds)
            assert "0.0 s" not in found.verdict


def test_with_one_seed_nothing_is_claimed_of_methods(tmp_path: Path) -> None:
    world = MadeUp(exact=True, n=200)
    world.right |= {"probe": 0.5, "full": 0.8}
    found = judged(tmp_path, world, seeds=1)
    verdict = found.judgement
    assert verdict.caution is not None
    assert verdict.caution.startswith("One seed: ")
    assert "no difference between methods is claimed" in verdict.sentence
    assert verdict.intervals.startswith("95 % of Wilson")
    row = {row.method: row for row in verdict.rows}
    assert row["probe"].observed == pytest.approx(-0.3)
    assert (row["probe"].difference, row["probe"].call, row["probe"].better) == (None, None, None)
    assert row["probe"].p_mcnemar is not None
    assert row["probe"].p_mcnemar < 0.001
    alone = wilson(160, 200)
    assert row["full"].accuracy is not None
    assert (row["full"].accuracy.lo, row["full"].accuracy.hi) == pytest.approx((alone.lo, alone.hi), abs=1e-6)
    assert row["full"].accuracy_over_seeds is None
    assert verdict.take is not None


def test_a_test_split_that_can_show_nothing_is_said_first(tmp_path: Path) -> None:
    caution = judged(tmp_path / "30", MadeUp(n=30)).judgement.caution
    assert caution is not None
    assert caution.startswith("This test split is too small to show most differences: less than ")
    assert judged(tmp_path / "2000", MadeUp(exact=True, n=2000)).judgement.caution is None


def test_a_row_says_how_likely_it_is_better_what_it_costs_and_every_test_by_name(tmp_path: Path) -> None:
    world = MadeUp(n=400)
    world.right |= {"probe": 0.6, "full": 0.8, "lp-ft": 0.9}
    rows = {row.method: row for row in judged(tmp_path, world).judgement.rows}
    assert (rows["lp-ft"].better or 0) > 0.975
    assert rows["probe"].better is not None
    assert rows["probe"].better < 0.025
    assert rows["lp-ft"].p_over_seeds is not None
    assert rows["lp-ft"].difference_over_seeds is not None
    assert rows["full"].better is None
    assert {name for name, row in rows.items() if row.front} == {"probe", "full", "lp-ft"}
    marks = rows["full"].marks
    assert marks is not None
    assert (marks.balanced_accuracy, marks.calibration_error) == (0.5, None)


def test_a_method_that_costs_more_for_less_is_not_on_the_front(tmp_path: Path) -> None:
    world = MadeUp(exact=True, n=100)
    world.right |= {"probe": 0.9, "full": 0.8}
    rows = judged(tmp_path, world, "probe,full").judgement.rows
    assert {row.method for row in rows if row.front} == {"probe"}


def test_every_run_has_wilsons_interval_and_the_winner_its_luck(tmp_path: Path) -> None:
    verdict = judged(tmp_path, MadeUp()).judgement
    assert len(verdict.runs) == 9
    first = verdict.runs[0]
    found = wilson(round(first.accuracy.mean * 150), 150)
    assert (first.accuracy.lo, first.accuracy.hi) == pytest.approx((found.lo, found.hi), abs=1e-6)
    assert verdict.luck is not None
    assert (verdict.luck.candidates, verdict.luck.method) == (3, leader(verdict))
    assert verdict.luck.naive > verdict.luck.corrected.mean - 0.01
    assert judged(tmp_path / "one", MadeUp(), "probe").judgement.luck is None


def leader(verdict: Verdict) -> str:
    return max(verdict.rows, key=lambda row: row.val_accuracy or 0).method


def test_the_luck_is_that_of_the_leader_and_not_of_the_cheaper_one_that_is_taken(tmp_path: Path) -> None:
    verdict = judged(tmp_path, MadeUp(exact=True, val_right={"full": 121 / 150}), "probe,full").judgement
    assert verdict.take is not None and verdict.luck is not None
    assert (verdict.take.method, verdict.luck.method) == ("probe", "full")
    assert verdict.luck.naive == pytest.approx(121 / 150, abs=1e-6)


def test_what_this_network_cannot_do_is_a_row_and_no_failure() -> None:
    run = Run(data="pictures", method="spottune")
    entry = Entry("spottune", run, status="skipped", reason="spottune cannot run here: no blocks.")
    found = judge([entry], labels=["spottune"], baseline="spottune")
    assert found.failed == []
    assert (found.rows[0].skipped, found.rows[0].failed) == (1, 0)
    assert found.rows[0].reason == found.sentence.removeprefix("No run finished: ")


def test_many_methods_against_one_baseline_are_said_to_be_many(tmp_path: Path) -> None:
    labels = [f"l2-sp[alpha=0.{i}]" for i in range(1, 6)]
    world = MadeUp(exact=True)
    notes = judged(tmp_path, world, ",".join(["full", *labels])).judgement.notes
    assert "5 methods were compared with full, each at 95 %" in " ".join(notes)


def test_all_right_everywhere(tmp_path: Path) -> None:
    world = MadeUp(right=dict.fromkeys(("probe", "full"), 1.0), exact=True, n=20)
    found = judged(tmp_path, world, "probe,full", seeds=2)
    accuracy = found.table[0]["accuracy"]
    assert accuracy["mean"] == accuracy["hi"] == 1
    assert accuracy["lo"] < 0.97
    assert found.judgement.smallest_difference is not None
    assert found.judgement.smallest_difference > 0.01


def test_the_file_is_the_record(tmp_path: Path) -> None:
    found = judged(tmp_path, MadeUp())
    assert read(found.folder) == found.judgement
    assert "points" in found.judgement.intervals or found.judgement.intervals.startswith("95 %")


def test_a_comparison_writes_its_report_and_what_there_is_to_know_about_its_pictures(tmp_path: Path) -> None:
    found = judged(tmp_path, MadeUp(), "probe,full", seeds=2)
    assert (found.folder / "audit.json").is_file()
    page = found.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert found.verdict.split("%")[0].split("'")[0] in page
    assert found.report() == found.folder / "report.html"


def test_nothing_finished() -> None:
    found = judge([], labels=["full"], baseline="full")
    assert isinstance(found, Verdict)
    assert found.take is None
    assert [row.method for row in found.rows] == ["full"]
