"""Bars on a terminal, lines elsewhere, and never a byte on stdout."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from headstart.cli.progress import Bars, counting, reporter, say_on_stderr
from headstart.method import Loss, Phase
from headstart.records import Result, Run, Score
from headstart.training.events import Lines, Reporter, Standing


def phase(done: int = 0) -> Phase:
    def objective(x: Any, y: Any) -> Loss:
        raise AssertionError("not called")

    return Phase("fine-tune", 4, [], objective, done=done)


def result(status: Any = "finished", reason: str | None = None) -> Result:
    test = Score(n=9, accuracy=0.5, balanced_accuracy=0.5, macro_f1=0.5, log_loss=1.0)
    run = Run(data="x")
    return Result(
        status=status,
        reason=reason,
        run=run,
        method="full",
        model="m",
        split_seed=0,
        seed=0,
        epochs=4,
        test=test if status == "finished" else None,
        seconds=12.3,
    )


def bars() -> tuple[Bars, io.StringIO]:
    screen = io.StringIO()
    return Bars(Console(file=screen, force_terminal=True, width=140, color_system=None)), screen


RECORD = {
    "phase": "fine-tune",
    "epoch": 3,
    "epochs": 4,
    "loss": 0.25,
    "val_accuracy": 0.75,
    "val_log_loss": 1.0,
}


def test_bars_of_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    made, screen = bars()
    made.begin(2)
    made.run("full-abc-s0", 1, 2)
    made.say("1 of 37 pictures [cannot] be read")
    made.phase(phase(done=2), 5)
    for _ in range(3):
        made.step()
    made.epoch(RECORD)
    made._bars.refresh()
    shown = screen.getvalue()
    assert "all runs" in shown and "0/2" in shown
    assert "full-abc-s0  fine-tune" in shown and "13/20" in shown  # after a resume, what is done counts
    assert "epoch 3/4  loss 0.250  val 0.750" in shown
    assert "1 of 37 pictures [cannot] be read\n" in shown
    made.row(result())
    assert "full-abc-s0  test accuracy 0.500 (n=9)  12 s" in screen.getvalue()
    made.run("l2-sp-abc-s0", 2, 2)
    made.row(result("failed", "The loss became nan."))
    assert "l2-sp-abc-s0  failed: The loss became nan." in screen.getvalue()
    made._bars.refresh()
    assert "2/2" in screen.getvalue()
    made.end()
    assert capsys.readouterr() == ("", "")


def test_bars_of_one_run() -> None:
    made, screen = bars()
    made.begin(1)
    made.run("full-abc-s0", 1, 1)
    made.epoch(RECORD | {"val_accuracy": None})
    made.row(result())
    made.step()  # nothing under way: nothing to do
    made.phase(phase(), 5)
    made.epoch(RECORD)
    made.end()
    assert "all runs" not in screen.getvalue()
    assert "test accuracy" not in screen.getvalue()  # the command says it


def test_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(reporter()) is Lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert type(reporter()) is Bars
    monkeypatch.setenv("RANK", "1")
    assert type(reporter()) is Reporter


def test_lines_for_people_go_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say_on_stderr("one")
    with counting("pictures") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "one\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with counting("pictures") as progress:
        progress(1, 2)
    assert capsys.readouterr().out == ""


def standing(**more: Any) -> Standing:
    told: dict[str, Any] = {
        "done": 3,
        "total": 8,
        "failed": 1,
        "spent": 192.0,
        "left": 700.0,
        "leader": "lp-ft",
        "leads_with": 0.8421,
        "under_way": {},
    }
    return Standing(**(told | more))


def test_where_a_comparison_stands_in_a_line() -> None:
    assert standing().said == "3.2 min of training, about 11.7 min left; 1 failed; leads on val: lp-ft 0.842"
    assert standing(left=None, failed=0, leader=None).said == "3.2 min of training"
    assert standing(spent=7300.0, done=8).said.startswith("2.0 h of training; 1 failed")
    told = io.StringIO()
    lines = Lines(told)
    for each in (standing(done=0), standing(), standing(), standing(done=4)):
        lines.standing(each)
    said = told.getvalue().splitlines()
    assert [line.split(";")[0] for line in said] == ["3 of 8 runs done", "4 of 8 runs done"]


def test_bars_of_runs_in_other_processes() -> None:
    bars = Bars(Console(file=io.StringIO(), width=160, force_terminal=True))
    bars.begin(8)
    record = {"epoch": 2, "epochs": 5, "loss": 0.5, "val_accuracy": 0.75}
    bars.standing(standing(under_way={"full-1-s0": {}, "probe-1-s0": record}))
    shown = {task.description: task for task in bars._bars.tasks}
    assert (shown["all runs"].completed, shown["all runs"].total) == (3, 8)
    assert "leads on val: lp-ft" in shown["all runs"].fields["said"]
    assert (shown["probe-1-s0"].completed, shown["probe-1-s0"].total) == (2, 5)
    assert "val 0.750" in shown["probe-1-s0"].fields["said"]
    bars.standing(standing(done=4, under_way={"probe-1-s0": record}))
    assert {task.description for task in bars._bars.tasks} == {"all runs", "probe-1-s0"}
    bars.end()
    assert [task.description for task in bars._bars.tasks] == ["all runs"]
