from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from headstart.comparison.selection import Chosen, corrected
from headstart.comparison.statistics import Answers


def candidates(
    rng: np.random.Generator, k: int, n: int
) -> tuple[dict[str, dict[int, Answers]], dict[str, float]]:
    """k candidates of about 80 % (standard deviation 1.5 points) whose errors correlate by 0.8."""
    truth = rng.normal(0.80, 0.015, k)
    latent = rng.normal(size=n) * 0.8**0.5 + rng.normal(size=(k, n)) * 0.2**0.5
    right = latent < stats.norm.ppf(truth)[:, None]
    names = [f"c{i:02d}" for i in range(k)]
    hashes = np.array([f"p{i:04d}" for i in range(n)])
    runs = {name: {0: Answers(right[i], hashes)} for i, name in enumerate(names)}
    return runs, dict(zip(names, truth, strict=True))


# How much too good the best of k looks on n pictures, in points: study of the field, simulated there.
@pytest.mark.parametrize(
    ("n", "k", "listed"), [(40, 4, 3.8), (40, 16, 6.8), (100, 4, 2.3), (100, 16, 4.0), (200, 16, 2.4)]
)
def test_the_corrected_estimate_is_unbiased_where_the_naive_one_is_optimistic(
    n: int, k: int, listed: float
) -> None:
    rng = np.random.default_rng(0)
    naive, honest = [], []
    for i in range(300):
        runs, truth = candidates(rng, k, n)
        found = corrected(runs, draws=200, seed=i)
        assert found is not None
        means = {name: of[0].right.mean() + rng.random() * 1e-9 for name, of in runs.items()}
        actual = truth[max(means, key=means.__getitem__)]
        naive.append(100 * (found.naive - actual))
        honest.append(100 * (found.corrected.mean - actual))
    noise = 3 * np.std(naive) / len(naive) ** 0.5
    assert np.mean(naive) == pytest.approx(listed, abs=noise + 0.1)
    assert abs(np.mean(honest)) < noise + 0.1


def test_with_one_candidate_there_is_nothing_to_correct() -> None:
    right = np.random.default_rng(0).random(300) < 0.8
    found = corrected({"a": {0: Answers(right, np.array([str(i) for i in range(300)]))}})
    assert isinstance(found, Chosen)
    assert found.naive == pytest.approx(right.mean())
    assert found.optimism == pytest.approx(0, abs=0.003)
    assert found.corrected.lo < right.mean() < found.corrected.hi


def test_seeds_that_only_some_have_are_left_out_and_none_gives_none() -> None:
    right = np.arange(20) < 15
    hashes = np.array([f"p{i:02d}" for i in range(20)])
    runs = {
        "a": {0: Answers(right, hashes), 1: Answers(~right, hashes)},
        "b": {0: Answers(right, hashes)},
    }
    found = corrected(runs, draws=50)
    assert found is not None
    assert found.naive == pytest.approx(0.75)
    assert corrected({"a": {0: Answers(right, hashes)}, "b": {1: Answers(right, hashes)}}) is None
    assert corrected({}) is None


def test_a_single_picture_leaves_nothing_outside() -> None:
    assert corrected({"a": {0: Answers(np.array([True]), np.array(["p"]))}}) is None
