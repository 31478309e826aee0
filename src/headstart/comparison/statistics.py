"""What accuracies on a few hundred pictures and a few seeds are worth.

Two things are drawn by chance in a comparison: the pictures a method is tested on, and the seed, from
which the split, the order of the pictures and the first weights of the head follow. A new collection of
pictures and new seeds would have given other numbers; the 95 % intervals here say how far off.

How an interval is made, for one method's accuracy and for the paired difference of two methods alike:

1.  Pictures: a Bayesian bootstrap (Rubin 1981, Annals of Statistics 9(1)). In each of 10,000 draws every
    distinct test picture gets a weight from the exponential distribution. The weight belongs to the
    picture (its content hash), so it is the same in every seed and for every method in which this
    picture is tested: three seeds on one test split are not three times as many pictures, and
    differences are paired. Half a picture is added to each of the four cells "both right, only one, only
    the other, both wrong", the prior of Agresti and Min (2005, Statistics in Medicine 24(5)). For one
    method that is one picture right and one wrong, and an interval close to Wilson's. So no interval
    collapses where all answers are right or two methods agree on every picture.
2.  Seeds: what the results vary between seeds beyond what the pictures explain, as a t distribution
    added to each draw. Two to five seeds measure that spread badly, and often by chance as zero, so one
    seed's worth of prior is mixed in: a run's accuracy moves by one point (standard deviation) from seed
    to seed, independently for the two methods of a difference.
3.  The 2.5 % and 97.5 % quantiles, widened where necessary to hold the estimate itself.

With one seed the spread over seeds is assumed, not measured.

Measured coverage of the interval of one method's accuracy / of the difference of two identical methods, in
per cent of 500 simulated comparisons (so +-1 point), both methods at 85 %, correlated errors, a new split in
every seed; "moves" is the standard deviation of a run's accuracy from seed to seed beyond the pictures. In
brackets the half width of the difference in points.

    n_test  seeds   moves 0              moves 1              moves 2
    100     1       97.0 / 98.8 (10.0)   95.4 / 98.0 (10.0)   94.2 / 96.2 (10.0)
    100     2       97.2 / 98.2  (7.9)   96.8 / 97.4  (8.0)   96.4 / 96.6  (8.9)
    100     3       96.2 / 97.0  (5.8)   95.2 / 98.2  (6.1)   95.0 / 95.6  (6.7)
    100     5       94.2 / 96.4  (4.1)   94.4 / 95.4  (4.2)   93.4 / 94.2  (4.7)
    300     1      100.0 / 100.0 (7.4)   98.6 / 99.8  (7.4)   94.6 / 95.8  (7.4)
    300     2       99.6 / 98.8  (5.2)   96.8 / 97.4  (5.9)   94.2 / 94.0  (7.1)
    300     3       97.0 / 97.2  (3.5)   96.0 / 96.4  (4.0)   94.4 / 94.8  (5.1)
    300     5       96.8 / 97.4  (2.4)   94.0 / 94.8  (2.7)   93.4 / 94.6  (3.4)

With one test split for all seeds it is 93 to 100 % in the same cases. So it is about right where seeds move a
run by up to two points, wider than needed where they do not, and optimistic where they move it by more. It
covers the choice of pictures, split and seed; not another camera, another network or other settings.

Two plainer ways were measured on the same simulations. Resampling the seeds too, with pictures nested in
them, counts the pictures' noise twice: with three and five seeds it covers 95 to 100 % at half widths 10 to
40 % above ours, and with two seeds that move by two points 92 to 95 % on 300 pictures. Student's interval
over the seeds' means (`over_seeds`, given beside ours) covers 90 to 98 % where every seed has a split of its
own, but 75 to 96 % for an accuracy where all seeds share one, and with two seeds it is +-17 to 30 points
wide. Leaving out the seeds covers 75 to 93 % where they move a run by two points.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

DRAWS = 10_000
SEED_SPREAD = 0.01  # prior standard deviation of a run's accuracy from seed to seed
_AT_ONCE = 4_000_000  # weights held in memory at once: draws x pictures


class Answers(NamedTuple):
    """What one run said about one split."""

    right: NDArray[np.bool_]  # [N]
    hashes: NDArray[np.str_]  # [N]  which pictures these are


class Interval(NamedTuple):
    """A mean and the 95 % interval around it, as shares (0.05 is five points)."""

    mean: float
    lo: float
    hi: float

    @property
    def half_width(self) -> float:
        """Half of its width: the smallest mean that could have been told from zero."""
        return (self.hi - self.lo) / 2

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below zero, 0 where it holds zero."""
        return int(self.lo > 0) - int(self.hi < 0)

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.hi, -self.lo)


def wilson(right: int, n: int) -> Interval:
    """Wilson's 95 % interval of one run's accuracy: over pictures only (Wilson 1927, JASA 22)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} right of {n} is no result.")
    found = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    return Interval(right / n, float(found.low), float(found.high))


def over_seeds(means: Sequence[float]) -> Interval | None:
    """Student's 95 % interval over the seeds' means; None for a single seed."""
    k = len(means)
    if k < 2:
        return None
    mean = float(np.mean(means))
    half = float(stats.t.ppf(0.975, k - 1) * np.std(means, ddof=1) / np.sqrt(k))
    return Interval(mean, mean - half, mean + half)


class _Difference(NamedTuple):
    """What the draws say of one pair of methods."""

    interval: Interval
    better: float  # share of the draws above zero


class Resampled:
    """The same draws of pictures for all runs of a comparison.

    Args:
        runs: answers by method and seed, or by split and seed. Runs of one seed are of the same pictures in
            the same order.
        draws: how many.
        seed: of the draws; the same answers give the same intervals.
    """

    def __init__(
        self, runs: Mapping[str, Mapping[Any, Answers]], *, draws: int = DRAWS, seed: int = 0
    ) -> None:
        self._runs = runs
        self._rng = np.random.default_rng(seed)
        hashes = {s: answers.hashes for of in runs.values() for s, answers in of.items()}
        pictures, codes = np.unique(np.concatenate(list(hashes.values())), return_inverse=True)
        ends = np.cumsum([len(each) for each in hashes.values()])[:-1]
        self._pictures = dict(zip(hashes, np.split(codes, ends), strict=True))  # numbers in place of hashes
        self._columns = {key: i for i, key in enumerate((m, s) for m, of in runs.items() for s in of)}
        self._columns_of_seed = {s: len(self._columns) + i for i, s in enumerate(self._pictures)}
        self._sums = self._draw(
            draws, len(pictures)
        )  # [draws, runs + seeds]  weight of right answers; of all pictures
        # Half a picture in each cell: only one right, only the other, and both or none.
        self._one = self._rng.gamma(0.5, size=draws)
        self._other = self._rng.gamma(0.5, size=draws)
        self._neither = self._rng.gamma(1.0, size=draws)
        self._uniform = self._rng.random(draws)
        self._t: dict[int, NDArray[np.float64]] = {}
        self._counted: dict[frozenset[Any], int] = {}  # different pictures in some seeds
        self._known: dict[tuple[str, str], _Difference | None] = {}

    def accuracy(self, method: str) -> Interval:
        """Mean accuracy of a method over its seeds."""
        seeds = list(self._runs[method])
        distinct = self._distinct(seeds)
        right = self._one + self._other  # together one picture right; the rest is one picture wrong
        drawn = [self._share(self._sum(method, s), right, s, distinct) for s in seeds]
        points = [self.point(method, s) for s in seeds]
        found = _interval(self._moved(drawn, points, SEED_SPREAD), points)
        return Interval(found.mean, max(0.0, found.lo), min(1.0, found.hi))

    def difference(self, method: str, other: str) -> Interval | None:
        """Accuracy of `method` minus that of `other`, over the seeds both have; None where there are none."""
        known = self._compared(method, other)
        return None if known is None else known.interval

    def better(self, method: str, other: str) -> float | None:
        """Probability that `method` is the better one, had other pictures and seeds been drawn."""
        known = self._compared(method, other)
        return None if known is None else known.better

    def _compared(self, method: str, other: str) -> _Difference | None:
        if (method, other) not in self._known:
            self._known[method, other] = self._difference(method, other)
        return self._known[method, other]

    def _difference(self, method: str, other: str) -> _Difference | None:
        seeds = self.shared(method, other)
        if not seeds:
            return None
        distinct = self._distinct(seeds)
        drawn = [
            self._share(self._sum(method, s) - self._sum(other, s), self._one - self._other, s, distinct)
            for s in seeds
        ]
        points = [self.point(method, s) - self.point(other, s) for s in seeds]
        moved = self._moved(drawn, points, SEED_SPREAD * 2**0.5)
        found = _interval(moved, points)
        return _Difference(
            Interval(found.mean, max(-1.0, found.lo), min(1.0, found.hi)), float((moved > 0).mean())
        )

    def shared(self, method: str, other: str) -> list[Any]:
        """The seeds that both methods have."""
        return [s for s in self._runs[method] if s in self._runs[other]]

    def point(self, method: str, seed: Hashable) -> float:
        """Accuracy of one run."""
        return float(self._runs[method][seed].right.mean())

    def _draw(self, draws: int, n: int) -> NDArray[np.float32]:
        table = np.zeros((n, len(self._columns) + len(self._pictures)), np.float32)
        for s, rows in self._pictures.items():  # a picture may lie twice in a split
            table[:, self._columns_of_seed[s]] = np.bincount(rows, minlength=n)
        for (method, s), column in self._columns.items():
            right = self._runs[method][s].right
            table[:, column] = np.bincount(self._pictures[s], weights=right, minlength=n)
        # Pictures that all runs answered alike are drawn together: k exponentials add up to a gamma of k.
        kinds, count = _kinds(table)
        step = max(1, _AT_ONCE // len(kinds))
        parts = []
        for start in range(0, draws, step):
            shape = (min(step, draws - start), len(kinds))
            if (count == 1).all():
                weights = self._rng.standard_exponential(shape, dtype=np.float32)
            else:
                weights = self._rng.standard_gamma(count, shape).astype(np.float32)
            parts.append(weights @ kinds)
        return np.concatenate(parts)

    def _sum(self, method: str, seed: Hashable) -> NDArray[np.float32]:
        return self._sums[:, self._columns[method, seed]]

    def _share(
        self, weight: NDArray[np.float32], prior: NDArray[np.float64], seed: Hashable, distinct: int
    ) -> NDArray[np.float64]:
        """Weighted share in one seed; of the prior's pictures it gets its part of the distinct ones."""
        part = len(self._pictures[seed]) / distinct
        total = self._sums[:, self._columns_of_seed[seed]] + part * (self._one + self._other + self._neither)
        share: NDArray[np.float64] = (weight + part * prior) / total
        return share

    def _distinct(self, seeds: list[Any]) -> int:
        key = frozenset(seeds)
        if key not in self._counted:
            self._counted[key] = len(np.unique(np.concatenate([self._pictures[s] for s in key])))
        return self._counted[key]

    def _moved(
        self, drawn: list[NDArray[np.float64]], points: list[float], spread: float
    ) -> NDArray[np.float64]:
        """See the module's docstring; drawn: K arrays [draws], points: what was observed in the K seeds."""
        k = len(points)
        by_seed = np.stack(drawn, axis=1)  # [draws, K]
        mean = by_seed.mean(axis=1)  # [draws]
        beyond = 0.0
        if k > 1:
            apart = by_seed - mean[:, None]
            explained = apart.var(axis=0).sum() / (k - 1)
            beyond = max(0.0, float(np.var(points, ddof=1)) - float(explained))
        variance = ((k - 1) * beyond + spread**2) / k
        freedom = max(k, 2)
        if freedom not in self._t:
            self._t[freedom] = special.stdtrit(freedom, self._uniform)
        moved: NDArray[np.float64] = mean + self._t[freedom] * np.sqrt(variance / k)
        return moved


def _kinds(table: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """The different rows of a table [N, C], and how many there are of each."""
    if table.max(initial=0) > 1 or table.shape[1] > 64:
        rows, count = np.unique(table, axis=0, return_counts=True)
        return rows, count
    # Zeros and ones of a row as one whole number: sorting rows takes longer than all the draws.
    bits = np.packbits(table.astype(bool), axis=1, bitorder="little")
    padded = np.zeros((len(table), 8), np.uint8)
    padded[:, : bits.shape[1]] = bits
    _, first, count = np.unique(padded.view(np.uint64), return_index=True, return_counts=True)
    return table[first], count


def _interval(moved: NDArray[np.float64], points: list[float]) -> Interval:
    """The middle 95 % of the draws, widened to hold what was observed."""
    lo, hi = np.quantile(moved, [0.025, 0.975])
    estimate = float(np.mean(points))
    return Interval(estimate, min(float(lo), estimate), max(float(hi), estimate))
