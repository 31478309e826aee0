"""Who is told what happens while runs go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from headstart.records import Result

if TYPE_CHECKING:
    from headstart.method import Phase  # torch comes with it; who only reports does without


class Standing(NamedTuple):
    """Where a comparison of many runs stands."""

    done: int
    total: int  # trials that a time budget may allow are not counted
    failed: int
    spent: float  # seconds of training, over all processes
    left: float | None  # seconds until the end, by what runs took so far; None: nothing to go by
    leader: str | None  # best on validation so far
    leads_with: float | None  # its validation accuracy
    under_way: Mapping[str, Mapping[str, Any]]  # by run, its last epoch's record; of other processes

    @property
    def said(self) -> str:
        """'3.2 min of training, about 12.0 min left; leads on val: full 0.840'"""
        text = f"{duration(self.spent)} of training"
        if self.left is not None and self.done < self.total:
            text += f", about {duration(self.left)} left"
        if self.failed:
            text += f"; {self.failed} failed"
        if self.leader is not None:
            text += f"; leads on val: {self.leader} {self.leads_with:.3f}"
        return text


def duration(seconds: float) -> str:
    """'45 s', '3.2 min', '1.5 h': two digits are enough to wait by."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Reporter:
    """Told what happens; this one says nothing. Every method may be overridden, none has to be."""

    def begin(self, runs: int) -> None:
        """So many runs are about to be looked at."""

    def run(self, name: str, index: int, total: int) -> None:
        """Run `index` (from 1) of `total` begins."""

    def say(self, text: str) -> None:
        """A line for a person."""

    def phase(self, phase: Phase, steps: int) -> None:
        """A phase begins, of `steps` steps an epoch."""

    def step(self) -> None:
        """One optimiser step is done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done; the record is the line that goes into metrics.jsonl."""

    def row(self, result: Result) -> None:
        """A run is done, or failed, or was done before."""

    def history(self, records: Sequence[dict[str, Any]]) -> None:
        """All epochs of a run that another process did; told when it is over, before its row."""

    def standing(self, standing: Standing) -> None:
        """How far a comparison of many runs is."""

    def end(self) -> None:
        """No more runs."""


class Lines(Reporter):
    """Plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.prefix = ""
        self.started = time.perf_counter()
        self._told = 0  # runs that were done when the standing was last told

    def standing(self, standing: Standing) -> None:
        """A line whenever a run more is done."""
        if standing.done > self._told and standing.total > 1:
            self._told = standing.done
            self._print(f"{standing.done} of {standing.total} runs done; {standing.said}")

    def run(self, name: str, index: int, total: int) -> None:
        """Lines of a run begin with its place and name."""
        self.prefix = f"[{index}/{total} {name}] " if total > 1 else ""
        self.started = time.perf_counter()
        if total > 1:
            self._print("started")

    def say(self, text: str) -> None:
        """The line as it is."""
        self._print(text)

    def epoch(self, record: dict[str, Any]) -> None:
        """Epoch, training loss, validation accuracy and loss, seconds."""
        val = ""
        if record.get("val_accuracy") is not None:
            val = f"  val accuracy {record['val_accuracy']:.3f}  val loss {record['val_log_loss']:.3f}"
        self._print(
            f"{record['phase']} epoch {record['epoch']}/{record['epochs']}  "
            f"loss {record['loss']:.3f}{val}  {record['seconds']:.1f} s"
        )

    def row(self, result: Result) -> None:
        """How the run ended."""
        if result.status != "finished":
            self._print(f"{result.status}: {result.reason}")
        elif result.run.trial and result.val is not None:
            val = result.val
            self._print(f"tried in {result.seconds:.0f} s  val accuracy {val.accuracy:.3f} (n={val.n})")
        elif result.test is not None:
            test = result.test
            self._print(f"finished in {result.seconds:.0f} s  test accuracy {test.accuracy:.3f} (n={test.n})")
        self.prefix = ""

    def _print(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            print(f"{self.prefix}{line}", file=self.stream, flush=True)
