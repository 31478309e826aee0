"""Which method to take, and whether the difference is real.

Two questions, and each is asked of its own pictures.

Which model is taken? Validation decides, alone. The leader is the method with the highest mean validation
accuracy over the seeds. Every method whose paired 95 % interval to the leader holds zero ties with it, and
the cheapest of these (seconds of a run) is taken. Of its runs, the one with the best validation accuracy
is shipped; at the same accuracy the one with the lower log-loss, then the lower seed. Test pictures play
no part in this, so their accuracy of the shipped method is not a best of several.

Are the differences real? The test split says, once: accuracy with its interval, the paired difference to
the baseline with its interval, and "better", "worse" or "tie" for an interval above, below or around zero.
No difference whose interval holds zero is called one.

The two can disagree. Where the test pictures show another method to be better than the one taken, the
sentence says so, and leaves the choice as it is.

Intervals: see `headstart.comparison.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from headstart.comparison.ledger import Entry
from headstart.comparison.statistics import Interval, Resampled, over_seeds
from headstart.records import Record, Result

Call = Literal["baseline", "better", "tie", "worse"]

INTERVALS = (
    "95 %, over test pictures (bootstrap, the same pictures for all methods) and over seeds "
    "(t, with a prior of one point from seed to seed worth one seed)"
)


class Range(Record):
    """A mean with its 95 % interval, as shares: 0.05 is five points."""

    mean: float
    lo: float
    hi: float

    @classmethod
    def of(cls, interval: Interval | None) -> Range | None:
        """Rounded, so that the last bits of a sum's order do not show; None stays None."""
        if interval is None:
            return None
        return cls(**{name: round(value, 6) for name, value in interval._asdict().items()})


class Row(Record):
    """One method."""

    method: str = Field(description="as it was asked for: 'l2-sp', or 'l2-sp:paper'")
    seeds: list[int] = Field(description="the seeds that finished")
    accuracy: Range | None = Field(None, description="on the test split, mean over the seeds")
    accuracy_over_seeds: Range | None = Field(None, description="Student's interval over the seeds' means")
    difference: Range | None = Field(None, description="accuracy minus the baseline's, in shared seeds")
    difference_over_seeds: Range | None = None
    call: Call | None = Field(None, description="against the baseline; None where that can't be said")
    val_accuracy: float | None = Field(None, description="on the validation split, mean over the seeds")
    seconds: float | None = Field(None, description="of one run, mean over the seeds")
    peak_memory_mb: float | None = Field(None, description="largest over the seeds")
    trained: int | None = None
    shipped: int | None = None
    failed: int = Field(0, description="runs that failed")
    reason: str | None = Field(None, description="why the first of these failed")


class Choice(Record):
    """What to take."""

    method: str
    run: str = Field(description="name of the run's folder, which lies under runs/")
    seed: int
    why: str


class Failure(Record):
    """A run that failed; it is tried again by the same call."""

    method: str
    seed: int
    reason: str
    folder: str | None = None


class Verdict(Record):
    """The outcome of a comparison; `verdict.json` holds it."""

    format: int = 1
    sentence: str
    take: Choice | None = None
    baseline: str | None = Field(None, description="what `difference` and `call` are against")
    rows: list[Row]
    failed: list[Failure] = Field(default_factory=list)
    pending: int = Field(0, description="runs that are still to come; above 0: the sentence may change")
    n_test: list[int] = Field(default_factory=list, description="test pictures, seed by seed")
    n_val: list[int] = Field(default_factory=list)
    distinct_test: int = Field(0, description="different test pictures over all seeds")
    smallest_difference: float | None = Field(
        None, description="median half width of the paired intervals: less than this could not be seen"
    )
    intervals: str = INTERVALS
    notes: list[str] = Field(default_factory=list)


def judge(entries: Sequence[Entry], *, labels: Sequence[str], baseline: str) -> Verdict:
    """The verdict about the runs of a comparison, from their results and predictions.

    Args:
        entries: all runs that were asked for; those not finished are listed, not judged.
        labels: the methods in the order of the table.
        baseline: label of the method that the others are compared with.
    """
    finished = [entry for entry in entries if entry.status == "finished"]
    failed = [
        Failure(
            method=entry.label,
            seed=entry.run.seed,
            reason=entry.reason or "",
            folder=entry.folder,
        )
        for entry in entries
        if entry.status == "failed"
    ]
    pending = sum(entry.status in ("pending", "interrupted") for entry in entries)
    if not finished:
        reasons = sorted({failure.reason for failure in failed})
        sentence = "No run has finished yet." if pending else f"No run finished: {' '.join(reasons)}"
        return Verdict(
            sentence=sentence,
            rows=[_empty(label, failed) for label in labels],
            failed=failed,
            pending=pending,
        )
    return _Judge(finished, labels, baseline).verdict(failed, pending, len(entries))


class _Judge:
    """One look at the finished runs."""

    def __init__(self, finished: list[Entry], labels: Sequence[str], baseline: str) -> None:
        self.runs: dict[str, dict[int, Entry]] = {}
        for label in labels:
            mine = {entry.run.seed: entry for entry in finished if entry.label == label}
            if mine:
                self.runs[label] = mine
        self.labels = labels
        self.notes: list[str] = []
        self.test = self._resampled("test")
        self.val = self._resampled("val")
        self.asked = baseline
        self.baseline = baseline if baseline in self.runs else next(iter(self.runs))

    def _resampled(self, split: str) -> Resampled:
        return Resampled(
            {
                label: {seed: entry.answers[split] for seed, entry in runs.items()}
                for label, runs in self.runs.items()
            }
        )

    def verdict(self, failed: list[Failure], pending: int, asked: int) -> Verdict:
        chosen, leader = self._choose()
        rows = [self._row(label, failed) for label in self.labels]
        halves = [(r.difference.hi - r.difference.lo) / 2 for r in rows if r.difference is not None]
        smallest = round(float(np.median(halves)), 6) if halves else None
        sentence = self._sentence(chosen, leader)
        if pending:
            sentence = f"So far ({asked - pending} of {asked} runs): {sentence}"
        self._note(rows)
        return Verdict(
            sentence=sentence,
            take=self._take(chosen, leader),
            baseline=self.baseline,
            rows=rows,
            failed=failed,
            pending=pending,
            n_test=self._counts("test"),
            n_val=self._counts("val"),
            distinct_test=self._distinct("test"),
            smallest_difference=smallest,
            notes=self.notes,
        )

    # ------------------------------------------------------------------ which: validation alone

    def _choose(self) -> tuple[str, str]:
        """The method to take and the leader on validation."""
        common = set.intersection(*(set(runs) for runs in self.runs.values()))

        def standing(label: str) -> tuple[float, float, float]:
            seeds = [seed for seed in self.runs[label] if not common or seed in common]
            accuracy = float(np.mean([self.val.point(label, seed) for seed in seeds]))
            log_loss = float(np.mean([_val(self._result(label, seed))[1] for seed in seeds]))
            return -round(accuracy, 9), log_loss, self._seconds(label)

        leader = min(self.runs, key=standing)
        ties = [label for label in self.runs if label == leader or self._ties(self.val, label, leader)]
        return min(ties, key=self._seconds), leader

    def _take(self, chosen: str, leader: str) -> Choice:
        runs = self.runs[chosen]

        def standing(seed: int) -> tuple[float, float, int]:
            accuracy, log_loss = _val(self._result(chosen, seed))
            return -accuracy, log_loss, seed

        seed = min(runs, key=standing)
        if len(self.runs) == 1:
            why = "the only method that finished"
        elif chosen == leader:
            why = "best on validation"
        else:
            why = f"the cheapest of those that tie with {leader}, the best on validation"
        if len(runs) > 1:
            why += f"; of its {len(runs)} runs, the best on validation"
        return Choice(method=chosen, run=Path(runs[seed].folder or "").name, seed=seed, why=why)

    def _ties(self, where: Resampled, label: str, other: str) -> bool:
        difference = where.difference(label, other)
        return difference is not None and difference.sign == 0

    # ------------------------------------------------------------------ how much: the test split

    def _row(self, label: str, failed: list[Failure]) -> Row:
        empty = _empty(label, failed)
        if label not in self.runs:
            return empty
        runs = self.runs[label]
        results = [self._result(label, seed) for seed in runs]
        difference, by_seed, call = None, None, None
        if label == self.baseline:
            call = "baseline"
        else:
            difference = self.test.difference(label, self.baseline)
            by_seed = over_seeds(
                [
                    self.test.point(label, seed) - self.test.point(self.baseline, seed)
                    for seed in self.test.shared(label, self.baseline)
                ]
            )
            if difference is not None:
                call = {1: "better", 0: "tie", -1: "worse"}[difference.sign]
        memory = [result.peak_memory_mb for result in results if result.peak_memory_mb is not None]
        parameters = [result.parameters for result in results if result.parameters is not None]
        return Row.model_validate(
            {
                "method": label,
                "seeds": list(runs),
                "accuracy": Range.of(self.test.accuracy(label)),
                "accuracy_over_seeds": Range.of(over_seeds([self.test.point(label, seed) for seed in runs])),
                "difference": Range.of(difference),
                "difference_over_seeds": Range.of(by_seed),
                "call": call,
                "val_accuracy": round(float(np.mean([self.val.point(label, seed) for seed in runs])), 6),
                "seconds": round(self._seconds(label), 2),
                "peak_memory_mb": max(memory) if memory else None,
                "trained": parameters[0].trained if parameters else None,
                "shipped": parameters[0].shipped if parameters else None,
                "failed": empty.failed,
                "reason": empty.reason,
            }
        )

    def _sentence(self, chosen: str, leader: str) -> str:
        others = [label for label in self.runs if label != chosen]
        accuracy = self.test.accuracy(chosen)
        if not others:
            return (
                f"Only {chosen} finished: {accuracy.mean:.1%} on {self._pictures('test')} "
                f"(95 % interval {accuracy.lo:.1%} to {accuracy.hi:.1%}), with nothing to compare it with."
            )
        against = {label: self.test.difference(label, chosen) for label in others}
        better = sorted((d, label) for label, d in against.items() if d is not None and d.sign > 0)
        worse = sorted((d, label) for label, d in against.items() if d is not None and d.sign < 0)
        tied = [label for label, d in against.items() if d is not None and d.sign == 0]
        if better:
            gap, best = better[-1]
            return self._overruled(chosen, leader, best, gap)
        over = None if chosen == self.baseline else self.test.difference(chosen, self.baseline)
        if over is not None and over.sign > 0:
            text = f"Take {chosen}: {self._gap(over, self.baseline)}{self._times(chosen, self.baseline)}."
            if tied:
                text += f" Not told apart from it on the test pictures: {_listed(tied)}."
            return text
        if tied:
            text = self._tie(chosen, leader, tied)
        else:
            text = f"Take {chosen}: every other method is worse on {self._pictures('test')}."
        for gap, label in worse:
            text += f" {label} is worse: {self._gap(gap)}."
        return text

    def _tie(self, chosen: str, leader: str, tied: list[str]) -> str:
        equal = [label for label in self.runs if label == chosen or label in tied]
        text = f"Tie: {_listed(equal)} can't be told apart on {self._pictures('test')}"
        cheaper = [label for label in tied if self._seconds(label) < self._seconds(chosen)]
        if cheaper:
            text += f". Take {chosen}: on validation, {leader} is better than the cheaper {_listed(cheaper)}"
            if leader != chosen:
                text += f", and {chosen} ties with it"
        else:
            rival = self.baseline if self.baseline in tied else min(tied, key=self._seconds)
            cost = f"{_time(self._seconds(chosen))} against {_time(self._seconds(rival))} of {rival}"
            text += f"; take the cheapest, {chosen} ({cost})"
        halves = [d.half_width for label in tied if (d := self.test.difference(label, chosen)) is not None]
        return text + f". Differences below about {100 * min(halves):.1f} points could not have been seen."

    def _overruled(self, chosen: str, leader: str, best: str, gap: Interval) -> str:
        how = "the best" if chosen == leader else f"the cheapest of those that tie with {leader}"
        return (
            f"Take {chosen}, {how} on validation. But on {self._pictures('test')} {best} is better: "
            f"{self._gap(gap)}{self._times(best, chosen)}. More seeds or validation pictures would settle it."
        )

    # ------------------------------------------------------------------ words and numbers

    def _gap(self, gap: Interval, over: str | None = None) -> str:
        points = f"{100 * gap.mean:+.1f} points" + (f" over {over}" if over else "")
        return f"{points} (95 % interval {100 * gap.lo:+.1f} to {100 * gap.hi:+.1f})"

    def _times(self, label: str, other: str) -> str:
        if not self._seconds(label) or not self._seconds(other):
            return ""
        ratio = self._seconds(label) / self._seconds(other)
        return f", at {ratio:.1f}x its time" if ratio >= 0.1 else f", at {ratio:.2f}x its time"

    def _pictures(self, split: str) -> str:
        counts, distinct = self._counts(split), self._distinct(split)
        what = f"{split} picture{'s' if max(counts) != 1 else ''}"
        if len(counts) == 1 or distinct == max(counts):
            return f"these {max(counts)} {what}"
        low, high = min(counts), max(counts)
        per_seed = str(low) if low == high else f"{low} to {high}"
        return f"the {len(counts)} splits' {per_seed} {what} each"

    def _counts(self, split: str) -> list[int]:
        by_seed = {s: len(e.answers[split].right) for runs in self.runs.values() for s, e in runs.items()}
        return [by_seed[seed] for seed in sorted(by_seed)]

    def _distinct(self, split: str) -> int:
        hashes = [entry.answers[split].hashes for runs in self.runs.values() for entry in runs.values()]
        return len(np.unique(np.concatenate(hashes)))

    def _seconds(self, label: str) -> float:
        return float(np.mean([self._result(label, seed).seconds for seed in self.runs[label]]))

    def _result(self, label: str, seed: int) -> Result:
        result = self.runs[label][seed].result
        assert result is not None, "a finished run has a result"
        return result

    def _note(self, rows: list[Row]) -> None:
        if self.baseline != self.asked:
            self.notes.append(f"{self.asked} has no finished run; compared with {self.baseline} instead.")
        seeds = {seed for runs in self.runs.values() for seed in runs}
        if len(seeds) == 1:
            self.notes.append(
                "One seed: the intervals cover the choice of pictures; what the seed does is assumed "
                "(one point), not measured. Use --seeds 3 or more."
            )
        uneven = [row.method for row in rows if row.seeds and len(row.seeds) < len(seeds)]
        if uneven:
            self.notes.append(
                f"{_listed(uneven)} did not finish with every seed; differences are over the seeds both have."
            )
        epochs = {entry.run.epochs for runs in self.runs.values() for entry in runs.values()}
        if len(epochs) > 1:
            self.notes.append("The runs were not asked for the same number of epochs.")
        if min(self._counts("test")) < 50:
            self.notes.append(
                f"{min(self._counts('test'))} test pictures are too few: only very large differences show."
            )


def _val(result: Result) -> tuple[float, float]:
    assert result.val is not None, "a finished run has a validation score"
    return result.val.accuracy, result.val.log_loss


def _empty(label: str, failed: list[Failure]) -> Row:
    """The row of a method of which nothing finished."""
    reasons = [failure.reason for failure in failed if failure.method == label]
    return Row(method=label, seeds=[], failed=len(reasons), reason=reasons[0] if reasons else None)


def _listed(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def read(folder: Path) -> Verdict:
    """Read a comparison's verdict.json."""
    return Verdict.model_validate_json((folder / "verdict.json").read_text(encoding="utf-8"))
