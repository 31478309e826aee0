"""How much more labels would bring, beside what another method would: accuracy against the number of labels.

The pictures of a smaller size are among those of a larger, and val and test stay the same, so that a curve is
paired throughout. Its errors are taken to fall as a power of the labels, err(n) = a · n^-b with 0 ≤ b ≤ 2
(Hestness et al., arXiv 1712.00409), which is fitted to each of many draws of splits, seeds and test pictures;
what the fits say of n + m labels is the advice, and its interval. It looks no further than twice the labels.
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


class Advice(NamedTuple):
    """What to do next, in numbers: shares, so that 0.015 is one and a half points."""

    labels: int  # there are
    more: int  # would be added
    gain: Interval  # by adding them
    exponent: float  # b
    other: str | None  # the best other method
    other_gain: Interval | None  # by taking it instead

    @property
    def sentence(self) -> str:
        """'200 more labels: about +1.5 ± 1.0 points; probe instead of full: about +0.2 ± 0.8 points.'"""
        text = f"{self.more} more labels: about {_points(self.gain)}"
        if self.other is not None and self.other_gain is not None:
            text += f"; {self.other} instead: about {_points(self.other_gain)}"
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
    by_label: dict[str, dict[int, dict[At, Answers]]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        if entry.status == "finished" and entry.result is not None and "test" in entry.answers:
            labels = entry.result.n_train or entry.train_size or 0
            by_label[entry.label][labels][entry.at] = entry.answers["test"]
    found: dict[str, Any] = {"curves": [], "advice": None, "numbers": None}
    for label, sizes in by_label.items():
        if len(sizes) > 1:
            found["curves"].append({"method": label, "points": _points_of(sizes)})
    if take in by_label and len(by_label[take]) > 1:
        said = advice(by_label[take], *_best_other(by_label, take))
        found |= {"advice": said.sentence, "numbers": said.plain()}
    return found


def _points_of(sizes: dict[int, dict[At, Answers]]) -> list[dict[str, Any]]:
    most = max(sizes)
    points = []
    for labels in sorted(sizes):
        numbered = dict(enumerate(sizes[labels][at] for at in sorted(sizes[labels])))
        accuracy = Resampled({"this": numbered}).accuracy("this")
        points.append(
            {
                "labels": labels,
                "share": round(labels / most, 3),
                **_plain(accuracy),
                "seeds": [str(at) for at in sorted(sizes[labels])],
            }
        )
    return points


def _best_other(
    by_label: dict[str, dict[int, dict[At, Answers]]], take: str
) -> tuple[str | None, Interval | None]:
    """The other method with the highest accuracy from all labels, and what it would change."""
    whole = {label: sizes[max(sizes)] for label, sizes in by_label.items()}
    mine = whole[take]
    others = {label: runs for label, runs in whole.items() if label != take and runs.keys() & mine.keys()}
    if not others:
        return None, None

    def right(runs: dict[At, Answers]) -> float:
        return float(np.mean([answers.right.mean() for at, answers in runs.items() if at in mine]))

    best = max(others, key=lambda label: right(others[label]))
    ats = sorted(mine.keys() & others[best].keys())
    both = {label: dict(enumerate(whole[label][at] for at in ats)) for label in (take, best)}
    return best, Resampled(both).difference(best, take)


def advice(sizes: dict[int, dict[At, Answers]], other: str | None, other_gain: Interval | None) -> Advice:
    """What more labels would bring to one method.

    Args:
        sizes: by number of labels, the answers of each run; two sizes at least.
        other: the best other method.
        other_gain: what taking it would change.
    """
    labels = max(sizes)
    more = MORE if labels >= MORE else max(1, labels // 10 * 10 or labels)
    ats = sorted(set.intersection(*(set(runs) for runs in sizes.values()))) or sorted(sizes[labels])
    n = np.array(sorted(sizes), dtype=float)
    wrong = {at: np.stack([~sizes[int(size)][at].right for size in n]) for at in ats}  # [sizes, pictures]
    rng = np.random.default_rng(0)
    errors = np.stack([wrong[at].mean(axis=1) for at in ats]).mean(axis=0)
    exponent, gain = _fit(n, errors[None], labels + more)
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
    mean = float(gain[0])
    return Advice(
        labels,
        more,
        Interval(mean, min(float(lo), mean), max(float(hi), mean)),
        float(exponent[0]),
        other,
        other_gain,
    )


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


def _points(gain: Interval) -> str:
    return f"{100 * gain.mean:+.1f} ± {100 * (gain.hi - gain.lo) / 2:.1f} points"


def _plain(interval: Interval) -> dict[str, float]:
    return {name: round(value, 6) for name, value in interval._asdict().items()}
