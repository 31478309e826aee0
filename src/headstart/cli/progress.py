"""What a person sees while runs go on: bars on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from headstart.cli.outcome import is_main
from headstart.method import Phase
from headstart.records import Result
from headstart.training.events import Lines, Reporter, Standing


def reporter() -> Reporter:
    """Bars where stderr is a terminal, lines where it is not, nothing in a helping process."""
    if not is_main():
        return Reporter()
    return Bars() if sys.stderr.isatty() else Lines()


class Bars(Reporter):
    """A bar for the whole with the time that is left, and one for the run under way."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
            console=self.console,
            transient=True,
            redirect_stdout=False,  # stdout belongs to the results
            redirect_stderr=True,  # a warning goes above the bars, not through them
        )
        self._whole: TaskID | None = None
        self._run: TaskID | None = None
        self._others: dict[str, TaskID] = {}  # runs of other processes
        self._name, self._many = "", False

    def begin(self, runs: int) -> None:
        """A bar over all runs, where there are several."""
        self._many = runs > 1
        if self._many:
            self._whole = self._bars.add_task("all runs", total=runs, unit="runs", said="")
        self._bars.start()

    def run(self, name: str, index: int, total: int) -> None:
        """A bar for this run."""
        self._drop()
        self._name = name
        self._run = self._bars.add_task(name, total=None, unit="steps", said="")

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase(self, phase: Phase, steps: int) -> None:
        """The run's bar starts again for this phase."""
        if self._run is not None:
            self._bars.reset(
                self._run,
                total=phase.epochs * steps,
                completed=phase.done * steps,
                description=f"{self._name}  {phase.name}",
                unit="steps",  # reset forgets the fields that it is not given
                said="",
            )

    def standing(self, standing: Standing) -> None:
        """The bar over all runs, with spend, time left and leader; one for each run of another process."""
        if self._whole is None:
            return
        self._bars.update(self._whole, total=standing.total, completed=standing.done, said=standing.said)
        for name in self._others.keys() - standing.under_way.keys():
            self._bars.remove_task(self._others.pop(name))
        for name, record in standing.under_way.items():
            if name not in self._others:
                self._others[name] = self._bars.add_task(name, total=None, unit="epochs", said="")
            if record:
                said = f"loss {record['loss']:.3f}"
                if record.get("val_accuracy") is not None:
                    said += f"  val {record['val_accuracy']:.3f}"
                self._bars.update(
                    self._others[name], total=record["epochs"], completed=record["epoch"], said=said
                )

    def step(self) -> None:
        """One step further."""
        if self._run is not None:
            self._bars.advance(self._run)

    def epoch(self, record: dict[str, Any]) -> None:
        """Loss and validation accuracy beside the bar."""
        said = f"epoch {record['epoch']}/{record['epochs']}  loss {record['loss']:.3f}"
        if record.get("val_accuracy") is not None:
            said += f"  val {record['val_accuracy']:.3f}"
        if self._run is not None:
            self._bars.update(self._run, said=said)

    def row(self, result: Result) -> None:
        """One run done; how it ended stays on the screen."""
        self._drop()
        if self._whole is not None:
            self._bars.advance(self._whole)
        if result.run.trial and result.status != "failed":
            return
        if result.status != "finished":
            self.say(f"{self._name}  {result.status}: {result.reason}")
        elif result.test is not None and self._many:
            self.say(
                f"{self._name}  test accuracy {result.test.accuracy:.3f} (n={result.test.n})  "
                f"{result.seconds:.0f} s"
            )

    def end(self) -> None:
        """Take the bars away."""
        self._drop()
        for task in self._others.values():
            self._bars.remove_task(task)
        self._others.clear()
        self._bars.stop()

    def _drop(self) -> None:
        if self._run is not None:
            self._bars.remove_task(self._run)
            self._run = None


def say_on_stderr(text: str) -> None:
    """A line for a person, where stdout belongs to the results."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for things that are counted, as a function of (done, all); nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
