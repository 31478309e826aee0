"""Which method to take, and whether the difference is real.

Two questions, and each is asked of its own pictures.

Which model is taken? Validation decides, alone. The leader is the method with the highest mean validation
accuracy over the repetitions (a repetition is one split with one seed). Every method whose paired 95 %
interval to the leader holds zero ties with it, and the cheapest of these (seconds of a run) is taken. Of
its runs, the one with the best validation accuracy is shipped; at the same accuracy the one with the lower
log-loss, then the lower seed. Test pictures play no part in this, so their accuracy of the shipped method
is not a best of several, neither of methods nor of the trials of a search, which are scored on validation
as well: it needs no correction. The validation accuracy of the leader is a best of several; what it is worth
once the luck of the choice among methods is taken out (`headstart.comparison.selection`) is said beside it,
of the leader and not of a cheaper one that is taken in its place. The luck of trials is not taken out: where
there was a search, both numbers are a little high.

Are the differences real? The test split says, once: accuracy with its interval, the paired difference to
the baseline with its interval, and "helps", "hurts" or "no evidence" for an interval above, below or
around zero. No difference whose interval holds zero is called one. With a single repetition no difference
is called anything: what another seed would have done was not measured.

The two can disagree. Where the test pictures show another method to be better than the one taken, the
sentence says so, and leaves the choice as it is.

Intervals: see `headstart.comparison.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headstart.comparison.ledger import At, Entry
from headstart.comparison.selection import corrected
from headstart.comparison.significance import corrected_t, mcnemar
from headstart.comparison.statistics import Interval, Resampled, over_seeds, wilson
from headstart.judgement import Call, Choice, Failure, Luck, Marks, Range, Row, Scored, Verdict, read
from headstart.records import Result

__all__ = ["Choice", "Failure", "Range", "Row", "Verdict", "judge", "read"]

INTERVALS = (
    "95 %, over test pictures (bootstrap, the same pictures for all methods) and over seeds "
    "(t, with a prior of one point from seed to seed worth one seed)"
)
_ONE_SEED = "95 % of Wilson, over test pictures only: of this one trained model, not of the method"
TOO_SMALL = 0.05  # a smallest difference that no difference between sound methods is likely to reach


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
    skipped = [entry for entry in entries if entry.status == "skipped"]
    pending = sum(entry.status in ("pending", "interrupted") for entry in entries)
    if not finished:
        reasons = sorted({failure.reason for failure in failed} | {entry.reason or "" for entry in skipped})
        sentence = "No run has finished yet." if pending else f"No run finished: {' '.join(reasons)}"
        return Verdict(
            sentence=sentence,
            rows=[_empty(label, failed, skipped) for label in labels],
            failed=failed,
            pending=pending,
        )
    return _Judge(finished, labels, baseline, failed, skipped).verdict(pending, len(entries))


class _Judge:
    """One look at the finished runs."""

    def __init__(
        self,
        finished: list[Entry],
        labels: Sequence[str],
        baseline: str,
        failed: list[Failure],
        skipped: list[Entry],
    ) -> None:
        self.failed, self.skipped = failed, skipped
        self.runs: dict[str, dict[At, Entry]] = {}
        for label in labels:
            mine = {entry.at: entry for entry in finished if entry.label == label}
            if mine:
                self.runs[label] = mine
        self.labels = labels
        self.notes: list[str] = []
        self.test = self._resampled("test")
        self.val = self._resampled("val")
        self.asked = baseline
        self.baseline = baseline if baseline in self.runs else next(iter(self.runs))
        self.repetitions = sorted({at for runs in self.runs.values() for at in runs})
        self.once = len(self.repetitions) == 1

    def _resampled(self, split: str) -> Resampled:
        return Resampled(
            {
                label: {at: entry.answers[split] for at, entry in runs.items()}
                for label, runs in self.runs.items()
            }
        )

    def verdict(self, pending: int, asked: int) -> Verdict:
        chosen, leader = self._choose()
        front = self._front()
        rows = [self._row(label, label in front) for label in self.labels]
        smallest = self._smallest()
        sentence = self._sentence(chosen, leader)
        if pending:
            sentence = f"So far ({asked - pending} of {asked} runs): {sentence}"
        self._note(rows)
        return Verdict(
            sentence=sentence,
            caution=self._caution(smallest),
            take=self._take(chosen, leader),
            baseline=self.baseline,
            rows=rows,
            runs=[self._scored(label, at) for label, runs in self.runs.items() for at in runs],
            failed=self.failed,
            pending=pending,
            n_test=self._counts("test"),
            n_val=self._counts("val"),
            distinct_test=self._distinct("test"),
            smallest_difference=smallest,
            luck=self._luck(leader),
            intervals=_ONE_SEED if self.once else INTERVALS,
            notes=self.notes,
        )

    def _smallest(self) -> float | None:
        against = [
            self.test.difference(label, self.baseline) for label in self.runs if label != self.baseline
        ]
        halves = [difference.half_width for difference in against if difference is not None]
        return round(float(np.median(halves)), 6) if halves else None

    def _luck(self, leader: str) -> Luck | None:
        """What the leader's validation accuracy is worth; with one method there was nothing to choose."""
        if len(self.runs) < 2:
            return None
        found = corrected(
            {
                label: {at: entry.answers["val"] for at, entry in runs.items()}
                for label, runs in self.runs.items()
            }
        )
        if found is None:
            return None
        of = _range(found.corrected)
        assert of is not None
        return Luck(method=leader, naive=round(found.naive, 6), corrected=of, candidates=found.candidates)

    # ------------------------------------------------------------------ which: validation alone

    def _choose(self) -> tuple[str, str]:
        """The method to take and the leader on validation."""
        common = set.intersection(*(set(runs) for runs in self.runs.values()))

        def standing(label: str) -> tuple[float, float, float]:
            shared = [at for at in self.runs[label] if not common or at in common]
            accuracy = float(np.mean([self.val.point(label, at) for at in shared]))
            log_loss = float(np.mean([_val(self._result(label, at))[1] for at in shared]))
            return -round(accuracy, 9), log_loss, self._seconds(label)

        leader = min(self.runs, key=standing)
        ties = [label for label in self.runs if label == leader or self._ties(self.val, label, leader)]
        return min(ties, key=self._seconds), leader

    def _take(self, chosen: str, leader: str) -> Choice:
        runs = self.runs[chosen]

        def standing(at: At) -> tuple[float, float, At]:
            accuracy, log_loss = _val(self._result(chosen, at))
            return -accuracy, log_loss, at

        at = min(runs, key=standing)
        if len(self.runs) == 1:
            why = "the only method that finished"
        elif chosen == leader:
            why = "best on validation"
        else:
            why = f"the cheapest of those that tie with {leader}, the best on validation"
        if len(runs) > 1:
            why += f"; of its {len(runs)} runs, the best on validation"
        return Choice(method=chosen, run=Path(runs[at].folder or "").name, seed=at.seed, why=why)

    def _ties(self, where: Resampled, label: str, other: str) -> bool:
        difference = where.difference(label, other)
        return difference is not None and difference.sign == 0

    # ------------------------------------------------------------------ how much: the test split

    def _row(self, label: str, front: bool) -> Row:
        empty = _empty(label, self.failed, self.skipped)
        if label not in self.runs:
            return empty
        runs = self.runs[label]
        results = [self._result(label, at) for at in runs]
        memory = [result.peak_memory_mb for result in results if result.peak_memory_mb is not None]
        speeds = [result.ms_per_image for result in results if result.ms_per_image is not None]
        parameters = [result.parameters for result in results if result.parameters is not None]
        flops = [result.flops for result in results if result.flops is not None]
        learnt = [result.n_train for result in results if result.n_train is not None]
        return empty.model_copy(
            update={
                "seeds": [at.seed for at in runs],
                "accuracy": _range(self._accuracy(label)),
                "accuracy_over_seeds": _range(over_seeds([self.test.point(label, at) for at in runs])),
                "marks": _marks(results),
                "val_accuracy": round(float(np.mean([self.val.point(label, at) for at in runs])), 6),
                "seconds": round(self._seconds(label), 2),
                "peak_memory_mb": max(memory) if memory else None,
                "ms_per_image": round(float(np.median(speeds)), 3) if speeds else None,
                "trained": parameters[0].trained if parameters else None,
                "shipped": parameters[0].shipped if parameters else None,
                "flops": max(flops) if flops else None,
                "learnt_from": int(np.median(learnt)) if learnt else None,
                "front": front,
                **self._against(label),
            }
        )

    def _accuracy(self, label: str) -> Interval:
        """Over pictures and seeds; with one seed over pictures, by Wilson."""
        if not self.once:
            return self.test.accuracy(label)
        right = self.runs[label][self.repetitions[0]].answers["test"].right
        return wilson(int(right.sum()), len(right))

    def _against(self, label: str) -> dict[str, object]:
        """The fields of a row that are about the baseline."""
        if label == self.baseline:
            return {"call": "baseline"}
        shared = self.test.shared(label, self.baseline)
        difference = self.test.difference(label, self.baseline)
        if difference is None:
            return {}
        found: dict[str, object] = {"observed": round(difference.mean, 6)}
        if self.once:
            mine, base = (self.runs[each][shared[0]].answers["test"].right for each in (label, self.baseline))
            return found | {"p_mcnemar": round(mcnemar(mine, base), 6)}
        calls: dict[int, Call] = {1: "helps", 0: "no evidence", -1: "hurts"}
        found |= {
            "difference": _range(difference),
            "better": round(self.test.better(label, self.baseline) or 0.0, 4),
            "call": calls[difference.sign],
        }
        tested = self._tested(label, shared)
        if tested is not None:
            found |= {"difference_over_seeds": _range(tested[0]), "p_over_seeds": round(tested[1], 6)}
        return found

    def _tested(self, label: str, shared: list[At]) -> tuple[Interval, float] | None:
        """The corrected resampled t over the splits; over the seeds where there is but one split."""
        gaps: dict[int, list[float]] = {}
        for at in shared:
            gaps.setdefault(at.split, []).append(
                self.test.point(label, at) - self.test.point(self.baseline, at)
            )
        if len(gaps) == 2:  # the interval would be wider than all accuracies there are
            return None
        if len(gaps) == 1:
            tested = corrected_t(next(iter(gaps.values())), 0.0)
        else:
            share = float(np.mean([self._test_share(label, at) for at in shared]))
            tested = corrected_t([float(np.mean(each)) for each in gaps.values()], share)
        return None if tested is None else (tested.interval, tested.p)

    def _test_share(self, label: str, at: At) -> float:
        """Test pictures per training picture."""
        entry = self.runs[label][at]
        n_train = entry.result.n_train if entry.result is not None else None
        if not n_train:  # a result of an older version
            return entry.run.split[2] / entry.run.split[0]
        return len(entry.answers["test"].right) / n_train

    def _front(self) -> set[str]:
        """The methods that no other beats in both accuracy and seconds (Pareto)."""
        at = {label: (self._accuracy(label).mean, -self._seconds(label)) for label in self.runs}
        return {
            label
            for label, mine in at.items()
            if not any(
                other != mine and all(o >= m for o, m in zip(other, mine, strict=True))
                for other in at.values()
            )
        }

    def _scored(self, label: str, at: At) -> Scored:
        entry = self.runs[label][at]
        right = entry.answers["test"].right
        accuracy = _range(wilson(int(right.sum()), len(right)))
        assert accuracy is not None
        run = Path(entry.folder or "").name
        return Scored(method=label, seed=at.seed, split=at.split, run=run, accuracy=accuracy)

    def _sentence(self, chosen: str, leader: str) -> str:
        others = [label for label in self.runs if label != chosen]
        accuracy = self._accuracy(chosen)
        if not others:
            whose = ", of this model" if self.once else ""
            return (
                f"Only {chosen} finished{self._cost(chosen)}: {accuracy.mean:.1%} on "
                f"{self._pictures('test')} (95 % interval {accuracy.lo:.1%} to {accuracy.hi:.1%}{whose}), "
                "with nothing to compare it with."
            )
        if self.once:
            return self._unclaimed(chosen, leader)
        against = {label: self.test.difference(label, chosen) for label in others}
        better = sorted((d, label) for label, d in against.items() if d is not None and d.sign > 0)
        worse = sorted((d, label) for label, d in against.items() if d is not None and d.sign < 0)
        tied = [label for label, d in against.items() if d is not None and d.sign == 0]
        apart = [label for label, d in against.items() if d is None]
        over = None if chosen == self.baseline else self.test.difference(chosen, self.baseline)
        if better:
            gap, best = better[-1]
            text = self._overruled(chosen, leader, best, gap)
        elif over is not None and over.sign > 0:
            text = f"Take {chosen}: {self._gap(over, self.baseline)}{self._times(chosen, self.baseline)}."
            if tied:
                text += f" Not told apart from it on the test pictures: {_listed(tied)}."
        else:
            if tied:
                text = self._tie(chosen, leader, tied)
            elif apart:
                text = f"Take {chosen}, {_how(chosen, leader)} on validation{self._cost(chosen)}."
            else:
                everywhere = self._pictures("test")
                text = f"Take {chosen}{self._cost(chosen)}: every other method is worse on {everywhere}."
            for gap, label in worse:
                text += f" {label} is worse: {self._gap(gap)}."
        if apart:
            text += f" {_listed(apart)} finished no repetition together with it: not compared."
        return text

    def _unclaimed(self, chosen: str, leader: str) -> str:
        """With one seed a model can be taken, but nothing said about methods."""
        how = (
            "the best on validation"
            if chosen == leader
            else f"the cheapest of those that validation can't tell from {leader}"
        )
        accuracy = self._accuracy(chosen)
        return (
            f"Take {chosen}, {how}{self._cost(chosen)}: {accuracy.mean:.1%} on "
            f"{self._pictures('test')} (95 % interval {accuracy.lo:.1%} to {accuracy.hi:.1%} for this "
            "model). With one seed no difference between methods is claimed."
        )

    def _tie(self, chosen: str, leader: str, tied: list[str]) -> str:
        equal = [label for label in self.runs if label == chosen or label in tied]
        text = f"Tie: {_listed(equal)} can't be told apart on {self._pictures('test')}"
        cheaper = [label for label in tied if self._seconds(label) < self._seconds(chosen)]
        if cheaper:
            priced = _listed([f"{label}{self._cost(label)}" for label in cheaper])
            text += (
                f". Take {chosen}{self._cost(chosen)}: on validation, {leader} is better than the cheaper "
            )
            text += priced
            if leader != chosen:
                text += f", and {chosen} ties with it"
        else:
            rival = self.baseline if self.baseline in tied else min(tied, key=self._seconds)
            text += f"; take the cheapest, {chosen}"
            if self._seconds(chosen):
                cost = f"{_time(self._seconds(chosen))} against {_time(self._seconds(rival))} of {rival}"
                text += f" ({cost})"
        smallest = self._smallest()
        seen = "" if smallest is None else f" Differences below about {100 * smallest:.1f} points could not"
        return f"{text}.{seen} have been seen." if seen else f"{text}."

    def _overruled(self, chosen: str, leader: str, best: str, gap: Interval) -> str:
        return (
            f"Take {chosen}, {_how(chosen, leader)} on validation{self._cost(chosen)}. "
            f"But on {self._pictures('test')} {best} is better: {self._gap(gap)}{self._times(best, chosen)}. "
            "More seeds or validation pictures would settle it."
        )

    # ------------------------------------------------------------------ words and numbers

    def _gap(self, gap: Interval, over: str | None = None) -> str:
        points = f"{100 * gap.mean:+.1f} points" + (f" over {over}" if over else "")
        return f"{points} (95 % interval {100 * gap.lo:+.1f} to {100 * gap.hi:+.1f})"

    def _cost(self, label: str) -> str:
        """' (28 s a run)'; empty where that is not known."""
        seconds = self._seconds(label)
        return f" ({_time(seconds)} a run)" if seconds else ""

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
        by = {
            at: len(entry.answers[split].right) for runs in self.runs.values() for at, entry in runs.items()
        }
        return [by[at] for at in sorted(by)]

    def _distinct(self, split: str) -> int:
        by = {at: entry.answers[split].hashes for runs in self.runs.values() for at, entry in runs.items()}
        return len(np.unique(np.concatenate(list(by.values()))))

    def _seconds(self, label: str) -> float:
        return float(np.mean([self._result(label, at).seconds for at in self.runs[label]]))

    def _result(self, label: str, at: At) -> Result:
        result = self.runs[label][at].result
        assert result is not None, "a finished run has a result"
        return result

    def _caution(self, smallest: float | None) -> str | None:
        """What a reader must know before the first number."""
        said = []
        if self.once:
            said.append(
                "One seed: what another seed or split would have changed was not measured, so no difference "
                "between methods is claimed. Use --seeds 3 or more."
            )
        fewest = min(self._counts("test"))
        if smallest is not None and smallest > TOO_SMALL:
            factor = (smallest / 0.02) ** 2
            said.append(
                f"This test split is too small to show most differences: less than "
                f"{100 * smallest:.0f} points could not be seen, and sound methods usually lie one to three "
                f"points apart. To see two points takes about {factor:.0f} times as many test pictures."
            )
        elif fewest < 50:
            said.append(f"{fewest} test pictures are too few: only very large differences show.")
        return " ".join(said) or None

    def _note(self, rows: list[Row]) -> None:
        if self.baseline != self.asked:
            self.notes.append(f"{self.asked} has no finished run; compared with {self.baseline} instead.")
        uneven = [row.method for row in rows if row.seeds and len(row.seeds) < len(self.repetitions)]
        if uneven:
            self.notes.append(
                f"{_listed(uneven)} did not finish with every seed; differences are over the seeds both have."
            )
        epochs = {entry.run.epochs for runs in self.runs.values() for entry in runs.values()}
        if len(epochs) > 1:
            self.notes.append("The runs were not asked for the same number of epochs.")
        claims = sum(row.call in ("helps", "hurts", "no evidence") for row in rows)
        if claims > 4:
            self.notes.append(
                f"{claims} methods were compared with {self.baseline}, each at 95 %: if none of them "
                f"differed, about {claims / 20:.1f} would be called different all the same."
            )


def _val(result: Result) -> tuple[float, float]:
    assert result.val is not None, "a finished run has a validation score"
    return result.val.accuracy, result.val.log_loss


def _empty(label: str, failed: list[Failure], skipped: list[Entry]) -> Row:
    """The row of a method of which nothing finished."""
    reasons = [failure.reason for failure in failed if failure.method == label]
    unfit = [entry.reason or "" for entry in skipped if entry.label == label]
    said = [*reasons, *unfit]
    return Row(
        method=label,
        seeds=[],
        failed=len(reasons),
        skipped=len(unfit),
        reason=said[0] if said else None,
        unfit=unfit[0] if unfit else None,
    )


def _marks(results: Sequence[Result]) -> Marks | None:
    scores = [result.test for result in results if result.test is not None]
    if not scores:
        return None

    def mean(name: str) -> float | None:
        values = [getattr(score, name) for score in scores]
        return None if None in values else round(float(np.mean(values)), 6)

    return Marks(**{name: mean(name) for name in Marks.model_fields})


def _range(interval: Interval | None) -> Range | None:
    """Rounded, so that the last bits of a sum's order do not show; None stays None."""
    if interval is None:
        return None
    return Range(**{name: round(value, 6) for name, value in interval._asdict().items()})


def _how(chosen: str, leader: str) -> str:
    return "the best" if chosen == leader else f"the cheapest of those that tie with {leader}"


def _listed(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
