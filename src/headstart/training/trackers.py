"""Experiment trackers behind one small protocol: off unless asked for, each an extra of its own.

A tracker is told what a run was asked, what each epoch and the end brought, and no more: nothing is sent
anywhere but where the tracker itself, as its owner set it up, sends it. One that fails is said once and then
left alone: no run ends for the sake of its bookkeeping.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headstart.errors import ConfigError, unknown
from headstart.records import Result
from headstart.training.events import Reporter


class Tracker(Protocol):
    """Four calls; values are plain numbers, and texts in `asked`."""

    def begin(self, name: str, asked: Mapping[str, Any]) -> None:
        """A run begins."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """An epoch is done."""
        ...

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """The run is over."""
        ...

    def close(self) -> None:
        """No more runs."""
        ...


class TensorBoard:
    """Event files under `folder`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, project: str) -> None:
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._folder = folder
        self._open: Any = None

    def begin(self, name: str, asked: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._open = self._writer(log_dir=str(self._folder / "tensorboard" / name))
        lines = "\n".join(f"| {key} | {value} |" for key, value in asked.items())
        self._open.add_text("asked", f"| field | value |\n|---|---|\n{lines}", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._open.add_scalar(name, value, step)

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._open.add_scalar(name, value, 0)
        self._open.close()

    def close(self) -> None:
        """See `Tracker`."""


class MLflow:
    """Runs of one experiment; where they go is MLFLOW_TRACKING_URI's to say, else a file under `folder`."""

    def __init__(self, folder: Path, project: str) -> None:
        import os

        self._mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
        self._mlflow.set_experiment(project)

    def begin(self, name: str, asked: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params(dict(asked))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """See `Tracker`."""
        self._mlflow.log_metrics(dict(values))
        self._mlflow.end_run("FINISHED" if status in ("finished", "pruned") else "FAILED")

    def close(self) -> None:
        """See `Tracker`."""


class _Wandb:
    """Weights & Biases, and Trackio, which speaks the same."""

    module: str

    def __init__(self, folder: Path, project: str) -> None:
        self._api, self._project, self._folder = importlib.import_module(self.module), project, folder

    def begin(self, name: str, asked: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._api.init(project=self._project, name=name, config=dict(asked), **self._more())

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._api.log(dict(values), step=step)

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """See `Tracker`."""
        self._api.log(dict(values))
        self._finish(status)

    def close(self) -> None:
        """See `Tracker`."""

    def _more(self) -> dict[str, Any]:
        return {}

    def _finish(self, status: str) -> None:
        self._api.finish()


class WeightsAndBiases(_Wandb):
    """Runs of one project; offline with WANDB_MODE=offline."""

    module = "wandb"

    def _more(self) -> dict[str, Any]:
        return {"dir": str(self._folder), "reinit": True}

    def _finish(self, status: str) -> None:
        self._api.finish(exit_code=0 if status in ("finished", "pruned") else 1)


class Trackio(_Wandb):
    """Runs of one project, on this machine unless Trackio was set up otherwise."""

    module = "trackio"


TRACKERS: Mapping[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def tracker(name: str, folder: Path) -> Tracker:
    """The tracker of that name.

    Args:
        name: one of `TRACKERS`.
        folder: where it may put files; its name is the project's.

    Raises:
        ConfigError: no such tracker, or one that is not installed.
    """
    try:
        return TRACKERS[name](folder, folder.absolute().name or "headstart")
    except ImportError as error:
        raise ConfigError(
            f"--track {name} needs a package that is not installed ({error.name or error}): "
            f"pip install 'headstart[{name}]'"
        ) from None
    except Exception as error:
        raise ConfigError(f"--track {name} cannot begin: {type(error).__name__}: {error}") from error


def tracked(reporter: Reporter, names: str | Sequence[str] | None, folder: Path) -> Reporter:
    """The reporter, and trackers beside it.

    Args:
        reporter: told all that happens.
        names: of trackers, a list or one text with commas; none of them for None.
        folder: where they may put files.

    Raises:
        ConfigError: a tracker that does not exist, or is not installed.
    """
    given = names.split(",") if isinstance(names, str) else list(names or ())
    wanted = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    for name in wanted:
        if name not in TRACKERS:
            raise ConfigError(unknown("tracker", name, TRACKERS))
    return Tracked(reporter, [tracker(name, folder) for name in wanted]) if wanted else reporter


class Tracked(Reporter):
    """Passes on what it is told, and tells the trackers."""

    def __init__(self, reporter: Reporter, trackers: Sequence[Tracker]) -> None:
        self.reporter, self.trackers = reporter, list(trackers)
        self._name, self._begun, self._step = "", False, 0

    def begin(self, runs: int) -> None:
        """Passed on."""
        self.reporter.begin(runs)

    def run(self, name: str, index: int, total: int) -> None:
        """The trackers hear of a run with its first epoch, or its end: one found finished is no news."""
        self._name, self._begun, self._step = name, False, 0
        self.reporter.run(name, index, total)

    def say(self, text: str) -> None:
        """Passed on."""
        self.reporter.say(text)

    def phase(self, phase: Any, steps: int) -> None:
        """Passed on."""
        self.reporter.phase(phase, steps)

    def step(self) -> None:
        """Passed on."""
        self.reporter.step()

    def epoch(self, record: dict[str, Any]) -> None:
        """Passed on, and its numbers logged."""
        self.reporter.epoch(record)
        self._log(record)

    def history(self, records: Sequence[dict[str, Any]]) -> None:
        """Passed on; the epochs of a run that another process did are logged when they are known."""
        self.reporter.history(records)
        for record in records:
            self._log(record)

    def _log(self, record: Mapping[str, Any]) -> None:
        self._begin()
        self._step += 1
        values = {
            name: float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._tell(lambda each: each.log(values, self._step))

    def row(self, result: Result) -> None:
        """Passed on; scores, seconds and sizes are logged, and the run is closed."""
        self.reporter.row(result)
        if not self._begun:
            return
        values = {"seconds": result.seconds}
        for split, score in (("val", result.val), ("test", result.test)):
            if score is not None:
                values |= {
                    f"final/{split}_{key}": float(value)
                    for key, value in score.model_dump(exclude={"n"}).items()
                    if value is not None
                }
        self._tell(lambda each: each.finish(values, result.status))
        self._begun = False

    def standing(self, standing: Any) -> None:
        """Passed on."""
        self.reporter.standing(standing)

    def end(self) -> None:
        """Passed on; the trackers are closed."""
        if self._begun:
            self._tell(lambda each: each.finish({}, "interrupted"))
            self._begun = False
        self._tell(lambda each: each.close())
        self.reporter.end()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            method, _, seed = self._name.rpartition("-s")  # "l2-sp-0123456789ab-s0"
            told = {"run": self._name, "method": method.rpartition("-")[0], "seed": seed}
            self._tell(lambda each: each.begin(self._name, told))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for each in list(self.trackers):
            try:
                what(each)
            except Exception as error:  # noqa: BLE001 - somebody else's code and server
                self.trackers.remove(each)
                name = type(each).__name__
                self.reporter.say(f"{name} is left out from here on: {type(error).__name__}: {error}")
