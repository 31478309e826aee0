"""How much more labels would bring, beside what another method would: accuracy against the number of labels.

The pictures of a smaller size are among those of a larger, and val and test stay the same, so that a curve is
paired throughout. Its errors are taken to fall as a power of the labels, err(n) = a · n^-b with 0 ≤ b ≤ 2
(Hestness et al., arXiv 1712.00409), which is fitted to each of many draws of splits, seeds and test pictures;
what the fits say of n + m labels is the advice, and its interval. It looks no further than twice the labels.

Runs of one point are those that were asked for alike: half of the labels may be other numbers of pictures in
other splits, and the point then stands at their mean. Advice is taken from the repetitions that finished at
every point, since a curve whose points are of different splits would rise and fall with these. Of a single
repetition nobody knows how another would have come out: it has no intervals, here as in the verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.comparison.ledger import At, Entry
from headstart.comparison.statistics import Answers, Interval, Resampled

SHARES = (0.25, 0.5, 0.75)  # of the labels there are; all of them were learnt from already
MORE = 200  # labels that the advice is about, where there are as many
DRAWS = 2000


class Asked(NamedTuple):
    """A number of labels as it was asked for; both None: all there are."""

    number: int | None
    share: float | None = None


class Run(NamedTuple):
    """A finished run on a point of a curve."""

    labels: int  # that it learnt from
    answers: Answers


class Gain(NamedTuple):
    """How much is to be gained, with its 95 % interval; without one where there is a single repetition."""

    mean: float
    lo: float | None = None
    hi: float | None = None


class Advice(NamedTuple):
    """What to do next, in numbers: shares, so that 0.015 is one and a half points."""

    labels: int  # there are
    more: int  # would be added
    gain: Gain  # by adding them
    exponent: float  # b
    other: str | None  # the best other method
    other_gain: Interval | None  # by taking it instead

    @property
    def sentence(self) -> str:
        """'200 more labels: about +1.5 ± 1.0 points; probe instead of full: about +0.2 ± 0.8 points.'"""
        text = f"{self.more} more labels: about {_points(self.gain)}"
        if self.other is not None and self.other_gain is not None:
            text += f"; {self.other} instead: about {_points(self.other_gain)}"
        if self.gain.lo is None:
            text += ", by one repetition: how sure that is was not measured"
        return f"{text}."

    def plain(self) -> dict[str, Any]:
        """As data that JSON holds."""
        other = None if self.other_gain is None else _plain(self.other_gain)
        return {
            "labels": self.labels,
            "more_labels": self.more,
            "gain": _plain(self.gain),
            "exponent": round(self.exponent, 4),
            "other_method": self.other,
            "other_gain": other,
        }


def curves(entries: Sequence[Entry], take: str | None) -> dict[str, Any]:
    """Curves of all methods that were run on several sizes, and advice about the one to take.

    Args:
        entries: finished runs of any size.
        take: label of the method to take.
    """
    by_label: dict[str, dict[Asked, dict[At, Run]]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        if entry.status == "finished" and entry.result is not None and "test" in entry.answers:
            asked = Asked(None if entry.share else entry.train_size, entry.share)
            labels = entry.result.n_train or entry.train_size or 0
            by_label[entry.label][asked][entry.at] = Run(labels, entry.answers["test"])
    found: dict[str, Any] = {"curves": [], "advice": None, "numbers": None, "why": None}
    for label, sizes in by_label.items():
        points = _points_of(sizes)
        if len(points) > 1:
            found["curves"].append({"method": label, "points": points})
    if take in by_label:
        said = _said(by_label, take)
        found |= (
            {"why": said} if isinstance(said, str) else {"advice": said.sentence, "numbers": said.plain()}
        )
    return found


def _said(by_label: dict[str, dict[Asked, dict[At, Run]]], take: str) -> Advice | str:
    """Advice about the one to take, or why there is none."""
    mine = by_label[take]
    complete = sorted(set.intersection(*(set(runs) for runs in mine.values())))
    sizes: dict[int, dict[At, Answers]] = {}
    for runs in mine.values():
        among = {at: runs[at] for at in complete}
        if among:
            sizes.setdefault(_mean(among), {at: run.answers for at, run in among.items()})
    if len(mine) < 2 or (complete and len(sizes) < 2):
        return "Nothing finished with fewer labels, so more are not judged."
    if not complete:
        return "No repetition finished with every number of labels, so more are not judged."
    return advice(sizes, *_best_other(by_label, take))


def _mean(runs: dict[At, Run]) -> int:
    """How many labels a point stands for: the mean over its splits."""
    return round(float(np.mean([run.labels for run in runs.values()])))


def _points_of(sizes: dict[Asked, dict[At, Run]]) -> list[dict[str, Any]]:
    by_labels: dict[int, dict[At, Run]] = {}
    for runs in sizes.values():
        by_labels.setdefault(_mean(runs), runs)  # a share may be what was asked for as a number too
    most = max(by_labels)
    points = []
    for labels, runs in sorted(by_labels.items()):
        numbered = dict(enumerate(runs[at].answers for at in sorted(runs)))
        accuracy = Resampled({"this": numbered}).accuracy("this")
        points.append(
            {
                "labels": labels,
                "share": round(labels / most, 3),
                **_plain(accuracy if len(runs) > 1 else Gain(accuracy.mean)),
                "seeds": [str(at) for at in sorted(runs)],
            }
        )
    return points


def _best_other(
    by_label: dict[str, dict[Asked, dict[At, Run]]], take: str
) -> tuple[str | None, Interval | None]:
    """The other method with the highest accuracy from as many labels, and what it would change.

    With one repetition in common no difference between methods is claimed.
    """
    most = max(by_label[take], key=lambda asked: _mean(by_label[take][asked]))
    whole = {label: sizes[most] for label, sizes in by_label.items() if most in sizes}
    mine = whole[take]
    others = {
        label: runs for label, runs in whole.items() if label != take and len(runs.keys() & mine.keys()) > 1
    }
    if not others:
        return None, None

    def right(runs: dict[At, Run]) -> float:
        return float(np.mean([run.answers.right.mean() for at, run in runs.items() if at in mine]))

    best = max(others, key=lambda label: right(others[label]))
    ats = sorted(mine.keys() & others[best].keys())
    both = {label: dict(enumerate(whole[label][at].answers for at in ats)) for label in (take, best)}
    return best, Resampled(both).difference(best, take)


def advice(sizes: dict[int, dict[At, Answers]], other: str | None, other_gain: Interval | None) -> Advice:
    """What more labels would bring to one method.

    Args:
        sizes: by number of labels, the answers of each run; two sizes at least, and the same splits and seeds
            in all of them.
        other: the best other method.
        other_gain: what taking it would change. Neither is told of a single repetition.
    """
    labels = max(sizes)
    more = MORE if labels >= MORE else max(1, labels // 10 * 10 or labels)
    ats = sorted(sizes[labels])
    n = np.array(sorted(sizes), dtype=float)
    wrong = {at: np.stack([~sizes[int(size)][at].right for size in n]) for at in ats}  # [sizes, pictures]
    rng = np.random.default_rng(0)
    errors = np.stack([wrong[at].mean(axis=1) for at in ats]).mean(axis=0)
    exponent, gain = _fit(n, errors[None], labels + more)
    mean, b = float(gain[0]), float(exponent[0])
    if len(ats) == 1:
        return Advice(labels, more, Gain(mean), b, None, None)
    drawn = np.zeros((DRAWS, len(n)))
    pictures = np.unique(np.concatenate([sizes[labels][at].hashes for at in ats]))
    weights = rng.exponential(size=(DRAWS, len(pictures)))  # the Bayesian bootstrap: one weight a picture
    chosen = rng.multinomial(len(ats), [1 / len(ats)] * len(ats), size=DRAWS)  # [DRAWS, ats]
    for i, at in enumerate(ats):
        where = np.searchsorted(pictures, sizes[labels][at].hashes)
        own = weights[:, where]  # [DRAWS, pictures of this split]
        drawn += chosen[:, i : i + 1] * (own @ wrong[at].T) / own.sum(axis=1, keepdims=True)
    _, gains = _fit(n, drawn / len(ats), labels + more)
    lo, hi = np.quantile(gains, [0.025, 0.975])
    return Advice(labels, more, Gain(mean, min(float(lo), mean), max(float(hi), mean)), b, other, other_gain)


def _fit(
    n: NDArray[np.float64], errors: NDArray[np.float64], then: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Power laws through errors [draws, sizes]: exponents, and how far each falls from max(n) to `then`."""
    y = np.log(np.maximum(errors, 1e-3))  # no error at all has no logarithm
    x = np.log(n) - np.log(n).mean()
    slope = (y - y.mean(axis=1, keepdims=True)) @ x / (x @ x)  # [draws]
    b = np.clip(-slope, 0.0, 2.0)
    level = y.mean(axis=1) + np.log(n).mean() * b  # log a
    now, later = (np.exp(level - b * np.log(size)) for size in (n.max(), then))
    return b, now - later


def _points(gain: Gain | Interval) -> str:
    points = f"{100 * gain.mean:+.1f}"
    if gain.lo is not None and gain.hi is not None:
        points += f" ± {100 * (gain.hi - gain.lo) / 2:.1f}"
    return f"{points} points"


def _plain(given: Gain | Interval) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 6) for name, value in given._asdict().items()}
