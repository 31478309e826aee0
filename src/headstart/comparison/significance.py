"""Tests of a difference, each for the case it was made for; thin over scipy.

One split, two trained models: McNemar's exact test. Several splits of one set: the corrected resampled t
test. Several data sets: Wilcoxon's signed ranks against the baseline, corrected after Holm for the number
of methods. A comparison's verdict comes from the intervals of `headstart.comparison.statistics`; these
stand beside it, for readers who ask for a test by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from headstart.comparison.statistics import Interval


def mcnemar(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Exact two-sided p-value that two models err equally often (McNemar 1947, Psychometrika 12).

    It is about these two trained models: another seed may have given others.

    Args:
        one: [N] which pictures the first got right.
        other: [N] which of the same pictures, in the same order, the second got right.
    """
    if one.shape != other.shape:
        raise ValueError(f"{one.shape} and {other.shape} are not answers to the same pictures.")
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(stats.binomtest(only_one, only_one + only_other, 0.5).pvalue)


class Tested(NamedTuple):
    """A test of a mean against zero."""

    statistic: float
    p: float
    interval: Interval  # 95 %


def corrected_t(differences: Sequence[float], test_share: float) -> Tested | None:
    """The corrected resampled t test (Nadeau and Bengio 2003, Machine Learning 52).

    Splits drawn again and again from the same pictures share most of what they train and test on, so the
    differences vary less between them than between fresh sets of pictures. The variance of the mean is
    s² (1/k + n_test/n_train) instead of s²/k.

    Args:
        differences: one per split, as shares.
        test_share: n_test / n_train; 0 gives Student's own test, for splits that have nothing in common.

    Returns:
        None for fewer than two splits, and where all differ by the same to the last bit: a spread of nothing
        is no estimate of one.
    """
    k = len(differences)
    if k < 2:
        return None
    mean, variance = float(np.mean(differences)), float(np.var(differences, ddof=1))
    if variance < 1e-18:
        return None
    error = (variance * (1 / k + test_share)) ** 0.5
    half = float(stats.t.ppf(0.975, k - 1)) * error
    statistic = mean / error
    p = float(2 * stats.t.sf(abs(statistic), k - 1))
    return Tested(statistic, p, Interval(mean, mean - half, mean + half))


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979, Scandinavian Journal of Statistics 6)."""
    order = np.argsort(p, kind="stable")
    raised = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return [float(value) for value in corrected]


class OverSets(NamedTuple):
    """One method against the baseline over several data sets."""

    method: str
    sets: int
    mean: float  # difference, as a share
    wins: int
    ties: int
    p: float  # Wilcoxon's, two-sided; exact up to 50 sets without ties
    p_holm: float


def over_sets(accuracies: Mapping[str, Mapping[str, float]], baseline: str) -> list[OverSets]:
    """Wilcoxon's signed-rank test of every method against the baseline over several data sets.

    After Demšar (2006, Journal of Machine Learning Research 7): one number per method and data set, the
    mean over its seeds, because seeds of one set are no independent sets. Fewer than six data sets can
    never reach 5 %.

    Args:
        accuracies: by method and data set; a method is tested on the sets it shares with the baseline.
        baseline: the method that the others are compared with.
    """
    base = accuracies[baseline]
    rows = []
    for method, mine in accuracies.items():
        shared = [name for name in base if name in mine]
        if method == baseline or not shared:
            continue
        # Rounded, so that equal differences are ties though their last bits are not.
        gaps = np.round([mine[name] - base[name] for name in shared], 9)
        p = float(stats.wilcoxon(gaps).pvalue) if gaps.any() else 1.0
        wins, ties = int((gaps > 0).sum()), int((gaps == 0).sum())
        rows.append(OverSets(method, len(shared), float(gaps.mean()), wins, ties, p, 1.0))
    corrected = holm([row.p for row in rows])
    return [row._replace(p_holm=value) for row, value in zip(rows, corrected, strict=True)]
