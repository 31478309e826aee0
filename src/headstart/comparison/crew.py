"""Who does the runs: this process alone, several processes, or a cluster, behind one small protocol."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from headstart.comparison.search import Watch, objective
from headstart.disk import write_json
from headstart.errors import HeadstartError
from headstart.records import Recipe, Result, Run
from headstart.training.events import Reporter


class Prepared(Protocol):
    """A run that is ready to be trained."""

    @property
    def run(self) -> Run:
        """What was asked."""
        ...

    @property
    def name(self) -> str:
        """Its folder's name: method, hash of all that was asked, seed."""
        ...

    @property
    def unfit(self) -> str | None:
        """Why its method cannot run on this network and these pictures; None where it can."""
        ...

    @property
    def recipe(self) -> Recipe:
        """How it is trained, every open value settled."""
        ...

    @property
    def learnt_from(self) -> int:
        """How many training pictures there are."""
        ...

    @property
    def audited(self) -> dict[str, Any]:
        """What there is to know about the pictures, as plain data for the report; empty for nothing."""
        ...


class Executor(Protocol):
    """How one run is prepared and trained, in the process that it is called in."""

    def prepare(self, run: Run, *, share: Any, say: Callable[[str], None]) -> Prepared:
        """Load what a run needs; `share` is an earlier one whose pictures and network may be used again."""
        ...

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        """Train it, and leave result.json and predictions.npz in the folder."""
        ...


class Here:
    """As `headstart train` does it."""

    def prepare(self, run: Run, *, share: Any, say: Callable[[str], None]) -> Prepared:
        """See `headstart.training.job.prepare`."""
        from headstart.training import job  # torch: who is given another executor does without

        return job.prepare(run, share=share, say=say)

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        """See `headstart.training.job.execute`."""
        from headstart.training import job

        return job.execute(prepared, folder, resume=resume, overwrite=overwrite, reporter=reporter)


@dataclass(frozen=True)
class Task:
    """A run to do, and where."""

    run: Run
    name: str
    folder: Path
    resume: bool = True
    overwrite: bool = False
    watch: Watch | None = None  # of a trial: when it is stopped early


@dataclass(frozen=True)
class Ended:
    """A task is over, for better or worse; what came out lies in its folder."""

    task: Task
    reason: str | None = None  # why it failed
    trace: str = ""


class Crew(Protocol):
    """Takes tasks, and says when they are over."""

    @property
    def size(self) -> int:
        """How many tasks can be under way at once."""
        ...

    @property
    def tells(self) -> bool:
        """Whether a run tells the reporter how it goes; else that is told of when it is over."""
        ...

    @property
    def busy(self) -> int:
        """How many are."""
        ...

    @property
    def under_way(self) -> dict[str, dict[str, Any]]:
        """By name of a run that is under way: its last epoch's record, empty before the first."""
        ...

    def start(self, task: Task, prepared: Prepared) -> None:
        """Begin a task; only while fewer than `size` are under way."""
        ...

    def next(self, patience: float) -> Ended | None:
        """Wait until one is over; None when nothing was for so many seconds."""
        ...

    def close(self) -> None:
        """Let go of what is still under way; it goes on with the same command."""
        ...


class Alone:
    """This process, one run after another."""

    size = 1
    tells = True

    def __init__(self, executor: Executor, reporter: Reporter) -> None:
        self.executor, self.reporter = executor, reporter
        self._waiting: tuple[Task, Prepared] | None = None

    @property
    def busy(self) -> int:
        """One between `start` and `next`."""
        return int(self._waiting is not None)

    @property
    def under_way(self) -> dict[str, dict[str, Any]]:
        """The reporter is told by the run itself."""
        return {}

    def start(self, task: Task, prepared: Prepared) -> None:
        """Remember the task; `next` does it."""
        self._waiting = task, prepared

    def next(self, patience: float) -> Ended | None:
        """Do it."""
        assert self._waiting is not None, "a task was started"
        (task, prepared), self._waiting = self._waiting, None
        return attempt(self.executor, task, prepared, self.reporter)

    def close(self) -> None:
        """Nothing is under way. A run gives back what the one before it held when it begins."""
        free_memory()


def attempt(executor: Executor, task: Task, prepared: Prepared, reporter: Reporter) -> Ended:
    """Do a task in this process. Whatever goes wrong is its outcome, but for an interrupt."""
    watched = reporter if task.watch is None else Watched(reporter, task, task.watch)
    try:
        if task.watch is not None and task.resume:  # killed between an epoch and the look at it
            stop = task.watch.stops_at(steps_of(task.folder))
            if stop is not None:
                raise Stopped(stop)
        executor.execute(
            prepared, task.folder, resume=task.resume, overwrite=task.overwrite, reporter=watched
        )
    except Stopped as stopped:
        reporter.row(_leave_pruned(task, prepared, stopped.epoch))
    except Exception as error:  # noqa: BLE001 - whatever it was, the other runs go on
        trace = "".join(traceback.format_exception(error))
        ended = Ended(task, reason_of(error), trace)
        traceback.clear_frames(error.__traceback__)  # they hold the network that did not fit
        free_memory()
        return ended
    return Ended(task)


# ---------------------------------------------------------------------- trials that are stopped early


class Stopped(Exception):
    """A trial that did worse than those before it."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"stopped after epoch {epoch}")
        self.epoch = epoch


class Watched(Reporter):
    """Passes on what it is told, and stops a trial that falls behind."""

    def __init__(self, reporter: Reporter, task: Task, watch: Watch) -> None:
        self.reporter, self.task, self.watch = reporter, task, watch

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
        """Passed on; then all epochs are looked at, those from before a kill too."""
        self.reporter.epoch(record)
        stop = self.watch.stops_at(steps_of(self.task.folder))
        if stop is not None:
            raise Stopped(stop)

    def row(self, result: Result) -> None:
        """Passed on."""
        self.reporter.row(result)


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's epochs; those that can be read."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def steps_of(folder: Path) -> list[float]:
    """What a search maximises, after each epoch of a run."""
    return [
        objective(record["val_accuracy"], record["val_log_loss"])
        for record in epochs_of(folder)
        if record.get("val_accuracy") is not None
    ]


def _leave_pruned(task: Task, prepared: Prepared, epoch: int) -> Result:
    """Its result.json: a trial that was stopped is over, and is not trained again."""
    run, records = task.run, epochs_of(task.folder)
    # A kill between the checkpoint of that epoch and the look at it costs one epoch more. The table does not
    # show it: it is the same after any kill.
    scored = [i for i, record in enumerate(records) if record.get("val_accuracy") is not None]
    counted = records[: scored[epoch - 1] + 1]
    result = Result(
        status="pruned",
        reason=f"stopped after epoch {epoch}: worse than the median of the trials before it",
        run=run,
        method=run.method,
        preset=run.preset,
        model=run.model,
        recipe=prepared.recipe,
        split_seed=run.seed if run.split_seed is None else run.split_seed,
        seed=run.seed,
        epochs=epoch,
        seconds=round(sum(record.get("seconds", 0.0) for record in counted), 2),
    )
    write_json(task.folder / "result.json", result.model_dump(mode="json"))
    (task.folder / "last.pt").unlink(missing_ok=True)
    return result


# ---------------------------------------------------------------------- what went wrong


def reason_of(error: Exception) -> str:
    """Why a run failed: our own errors as they are, others with their type and last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, HeadstartError):
        return " ".join(line.strip() for line in lines) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Out of memory. Use a smaller --batch-size or --img-size."
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def free_memory() -> None:
    """Let go of what a run held: cycles hold networks, and CUDA keeps its blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def again(task: Task) -> Task:
    """The same task after its process died: it goes on where it was."""
    return replace(task, resume=True, overwrite=False)
