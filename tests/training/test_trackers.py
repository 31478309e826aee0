"""Trackers: told what happened, off by default, and never in the way."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import ConfigError
from headstart.records import Result, Run, Score
from headstart.training import trackers
from headstart.training.events import Reporter, Standing
from headstart.training.trackers import TRACKERS, Tracked, tracked, tracker

EPOCH = {"phase": "fit", "epoch": 1, "epochs": 2, "loss": 0.5, "val_accuracy": 0.75, "val_log_loss": None}
NAME = "l2-sp-0123456789ab-s4"


def ended(status: Any = "finished", **more: Any) -> Result:
    score = Score(n=8, accuracy=0.5, balanced_accuracy=0.5, macro_f1=0.4, log_loss=0.7)
    return Result(
        status=status,
        run=Run(data="x"),
        method="l2-sp",
        model="net",
        split_seed=4,
        seed=4,
        epochs=2,
        seconds=3.0,
        val=score,
        test=score,
        **more,
    )


class Kept:
    """Remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, name: str, asked: Mapping[str, Any]) -> None:
        self.calls.append(("begin", name, dict(asked)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.calls.append(("log", dict(values), step))

    def finish(self, values: Mapping[str, float], status: str) -> None:
        self.calls.append(("finish", dict(values), status))

    def close(self) -> None:
        self.calls.append(("close",))


class Heard(Reporter):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def say(self, text: str) -> None:
        self.calls.append(text)

    def epoch(self, record: dict[str, Any]) -> None:
        self.calls.append(("epoch", record["epoch"]))

    def row(self, result: Result) -> None:
        self.calls.append(("row", result.status))


def test_a_tracker_hears_of_epochs_and_the_end_and_so_does_the_reporter() -> None:
    kept, heard = Kept(), Heard()
    both = Tracked(heard, [kept])
    both.begin(1)
    both.run(NAME, 1, 1)
    both.phase(None, 3)
    both.step()
    both.epoch(EPOCH)
    both.epoch(EPOCH | {"epoch": 2})
    both.row(ended())
    both.standing(Standing(1, 1, 0, 1.0, None, None, None, {}))
    both.end()
    assert [call[0] for call in kept.calls] == ["begin", "log", "log", "finish", "close"]
    assert kept.calls[0] == ("begin", NAME, {"run": NAME, "method": "l2-sp", "seed": "4"})
    assert kept.calls[1] == ("log", {"epoch": 1.0, "epochs": 2.0, "loss": 0.5, "val_accuracy": 0.75}, 1)
    assert kept.calls[2][2] == 2
    assert kept.calls[3][1]["final/test_accuracy"] == 0.5
    assert kept.calls[3][1]["seconds"] == 3.0
    assert heard.calls == [("epoch", 1), ("epoch", 2), ("row", "finished")]


def test_a_run_that_was_finished_before_is_no_news_and_one_done_elsewhere_is() -> None:
    kept = Kept()
    both = Tracked(Reporter(), [kept])
    both.run(NAME, 1, 2)
    both.row(ended())
    assert kept.calls == []
    both.run(NAME, 2, 2)
    both.history([EPOCH, EPOCH])
    both.row(ended())
    assert [call[0] for call in kept.calls] == ["begin", "log", "log", "finish"]


def test_a_run_that_was_interrupted_is_closed() -> None:
    kept = Kept()
    both = Tracked(Reporter(), [kept])
    both.run(NAME, 1, 1)
    both.epoch(EPOCH)
    both.end()
    assert kept.calls[-2:] == [("finish", {}, "interrupted"), ("close",)]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on() -> None:
    class Broken(Kept):
        def log(self, values: Mapping[str, float], step: int) -> None:
            raise ConnectionError("no server")

    kept, heard = Kept(), Heard()
    both = Tracked(heard, [Broken(), kept])
    both.run(NAME, 1, 1)
    both.epoch(EPOCH)
    both.epoch(EPOCH)
    assert [call[0] for call in kept.calls] == ["begin", "log", "log"]
    said = [call for call in heard.calls if isinstance(call, str)]
    assert said == ["Broken is left out from here on: ConnectionError: no server"]


def test_none_is_on_unless_asked_for(tmp_path: Path) -> None:
    heard = Heard()
    assert tracked(heard, None, tmp_path) is heard
    assert tracked(heard, "", tmp_path) is heard
    assert not [name for name in ("wandb", "mlflow", "trackio") if name in sys.modules]


@pytest.mark.parametrize("name", TRACKERS)
def test_what_is_not_installed_is_said_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def missing(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=rf"pip install 'headstart\[{name}\]'"):
        tracker(name, tmp_path)


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        tracked(Reporter(), "tensorboard,wanbd", tmp_path)


# ---------------------------------------------------------------------- each of them, with a stand-in module


class Module(types.ModuleType):
    """Remembers how its functions were called."""

    def __init__(self, name: str, *functions: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for function in functions:
            setattr(self, function, self._noting(function))

    def _noting(self, function: str) -> Any:
        def note(*values: Any, **named: Any) -> None:
            self.calls.append((function, values, named))

        return note


def walk(name: str, folder: Path, status: str = "finished") -> None:
    both = tracked(Reporter(), name, folder)
    both.run(NAME, 1, 1)
    both.epoch(EPOCH)
    both.row(ended(status))
    both.end()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_weights_and_biases_and_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    module = Module(name, "init", "log", "finish")
    monkeypatch.setitem(sys.modules, name, module)
    walk(name, tmp_path / "project")
    assert [call[0] for call in module.calls] == ["init", "log", "log", "finish"]
    begun = module.calls[0][2]
    assert (begun["project"], begun["name"], begun["config"]["method"]) == ("project", NAME, "l2-sp")
    assert module.calls[1][2] == {"step": 1}


def test_a_failed_run_is_one_to_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = Module("wandb", "init", "log", "finish")
    monkeypatch.setitem(sys.modules, "wandb", module)
    walk("wandb", tmp_path, "failed")
    assert module.calls[-1] == ("finish", (), {"exit_code": 1})


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    module = Module("mlflow", *names)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    walk("mlflow", tmp_path)
    called = [call[0] for call in module.calls]
    assert called == [*names[:5], "log_metrics", "end_run"]
    assert module.calls[0][1] == (f"sqlite:///{tmp_path / 'mlflow.db'}",)
    assert module.calls[-1][1] == ("FINISHED",)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    module.calls.clear()
    walk("mlflow", tmp_path, "failed")
    assert module.calls[0][0] == "set_experiment"
    assert module.calls[-1][1] == ("FAILED",)


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = Module("writer", "add_text", "add_scalar", "close")
    made: list[str] = []

    def writer(log_dir: str) -> Module:
        made.append(log_dir)
        return module

    found = types.SimpleNamespace(SummaryWriter=writer)
    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: found)
    walk("tensorboard", tmp_path)
    assert made == [str(tmp_path / "tensorboard" / NAME)]
    scalars = {call[1][0] for call in module.calls if call[0] == "add_scalar"}
    assert {"loss", "val_accuracy", "final/test_accuracy", "seconds"} <= scalars
    assert module.calls[-1][0] == "close"
