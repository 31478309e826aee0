from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as theirs
from statsmodels.stats.multitest import multipletests

from headstart.comparison.significance import corrected_t, holm, mcnemar, over_sets

# Test accuracies on ten data sets as the Transfer-Learning-Library's README has them (ResNet-50, all labels):
# Food CIFAR-10 CIFAR-100 SUN Cars Aircraft DTD Pets Caltech101 Flowers.
SETS = ["food", "c10", "c100", "sun", "cars", "aircraft", "dtd", "pets", "caltech", "flowers"]
TABLE = {
    "erm": [85.1, 96.6, 84.1, 63.7, 87.8, 80.1, 70.8, 93.2, 91.1, 93.0],
    "lwf": [83.9, 96.5, 83.6, 64.1, 87.4, 82.2, 72.2, 94.0, 89.8, 92.9],
    "delta": [83.8, 95.9, 83.7, 64.5, 88.1, 82.3, 72.2, 94.2, 90.1, 93.1],
    "bss": [85.0, 96.6, 84.2, 63.5, 88.4, 81.8, 70.2, 93.3, 91.6, 92.7],
    "stochnorm": [85.0, 96.8, 83.9, 63.0, 87.7, 81.5, 71.3, 93.6, 90.5, 92.9],
    "bi-tuning": [85.7, 97.1, 84.3, 64.2, 90.3, 84.8, 70.6, 93.5, 91.5, 94.5],
}


def pairs(only_one: int, only_other: int, both: int = 20) -> tuple[np.ndarray, np.ndarray]:
    one = np.array([True] * only_one + [False] * only_other + [True] * both)
    other = np.array([False] * only_one + [True] * only_other + [True] * both)
    return one, other


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (6, 16), (16, 6), (5, 5), (40, 12)])
def test_mcnemar_is_statsmodels(b: int, c: int) -> None:
    expected = theirs([[20, b], [c, 3]], exact=True).pvalue
    assert mcnemar(*pairs(b, c)) == pytest.approx(expected)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(*pairs(5, 0)) == pytest.approx(2 * 0.5**5)


def test_mcnemar_wants_the_same_pictures() -> None:
    with pytest.raises(ValueError, match="not answers to the same pictures"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))


def test_without_a_correction_it_is_students_test() -> None:
    gaps = [0.01, 0.03, -0.01, 0.02, 0.04]
    found = corrected_t(gaps, 0)
    expected = stats.ttest_1samp(gaps, 0)
    assert found is not None
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)
    ours, theirs_ = found.interval, expected.confidence_interval(0.95)
    assert (ours.lo, ours.hi) == pytest.approx((theirs_.low, theirs_.high))


def test_the_correction_is_nadeau_and_bengios() -> None:
    """Their equation: mean / sqrt((1/J + n2/n1) s²)."""
    gaps = np.array([0.01, 0.03, -0.01, 0.02, 0.04, 0.0, 0.01, 0.02, 0.03, 0.01])
    found = corrected_t(list(gaps), 1 / 9)
    assert found is not None
    assert found.statistic == pytest.approx(gaps.mean() / np.sqrt((1 / 10 + 1 / 9) * gaps.var(ddof=1)))
    plain = corrected_t(list(gaps), 0)
    assert plain is not None
    assert found.interval.half_width == pytest.approx(plain.interval.half_width * np.sqrt(1 + 10 / 9))
    assert found.p > plain.p


def test_splits_that_agree_to_the_last_bit() -> None:
    assert corrected_t([0.25, 0.25], 0.3) is None
    assert corrected_t([0.1], 0.3) is None


def test_the_corrected_test_keeps_its_level_on_overlapping_splits_where_the_plain_one_does_not() -> None:
    """Two equal methods on ten random splits of one set of pictures."""
    rng = np.random.default_rng(0)
    wrong = {0.0: 0, 0.25: 0}
    repeats = 400
    for _ in range(repeats):
        gap = (rng.random(500) < 0.8).astype(float) - (rng.random(500) < 0.8)
        gaps = [float(gap[rng.permutation(500)[:100]].mean()) for _ in range(10)]
        for share in wrong:
            found = corrected_t(gaps, share)
            assert found is not None
            wrong[share] += found.p < 0.05
    assert wrong[0.25] / repeats < 0.08
    assert wrong[0.0] / repeats > 0.1


@pytest.mark.parametrize("p", [[0.01], [0.01, 0.04, 0.03], [0.5, 0.5], [0.2, 0.001, 0.02, 0.9, 0.02], []])
def test_holm_is_statsmodels(p: list[float]) -> None:
    expected = multipletests(p, method="holm")[1] if p else []
    assert holm(p) == pytest.approx(list(expected))


def test_ten_published_data_sets_show_one_method_of_five() -> None:
    accuracies = {
        method: {name: value / 100 for name, value in zip(SETS, values, strict=True)}
        for method, values in TABLE.items()
    }
    found = {row.method: row for row in over_sets(accuracies, "erm")}
    assert list(found) == ["lwf", "delta", "bss", "stochnorm", "bi-tuning"]
    for method, values in TABLE.items():
        if method != "erm":
            gaps = np.round(np.subtract(values, TABLE["erm"]), 6)
            assert found[method].p == pytest.approx(stats.wilcoxon(gaps).pvalue)
            assert found[method].mean == pytest.approx(gaps.mean() / 100)
    best = found["bi-tuning"]
    assert (best.wins, best.sets) == (9, 10)
    assert best.p < 0.01
    assert best.p_holm < 0.05
    assert all(row.p_holm > 0.5 for method, row in found.items() if method != "bi-tuning")


def test_a_method_that_is_the_baseline_everywhere_and_one_that_shares_no_set() -> None:
    found = over_sets(
        {"full": {"a": 0.5, "b": 0.6}, "same": {"a": 0.5, "b": 0.6}, "other": {"c": 1.0}}, "full"
    )
    assert [(row.method, row.p, row.ties) for row in found] == [("same", 1.0, 2)]
