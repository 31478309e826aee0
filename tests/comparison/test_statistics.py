from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from headstart.comparison.statistics import (
    SEED_SPREAD,
    Answers,
    Interval,
    Resampled,
    over_seeds,
    wilson,
)


def answers(right: np.ndarray, seed: int = 0, *, shared: bool = False) -> Answers:
    name = "p" if shared else f"p{seed}"
    return Answers(np.asarray(right, bool), hashes(name, len(right)))


@cache
def hashes(name: str, n: int) -> np.ndarray:
    return np.array([f"{name}-{i:05d}" for i in range(n)])


def first(right: int, n: int) -> np.ndarray:
    return np.arange(n) < right


def world(
    rng: np.random.Generator, *, seeds: int, n: int, gap: float = 0.0, spread: float = 0.01
) -> dict[str, dict[int, Answers]]:
    """Two methods at 85 % (b is better by `gap`), pictures of their own difficulty, and seeds that vary."""
    slope = stats.norm.pdf(stats.norm.ppf(0.85))
    moved = spread / slope
    found: dict[str, dict[int, Answers]] = {"a": {}, "b": {}}
    for seed in range(seeds):
        difficulty = rng.normal(size=n) * 0.6**0.5
        for method, share in (("a", 0.85), ("b", 0.85 + gap)):
            at = stats.norm.ppf(share) * (1 + moved**2) ** 0.5 + rng.normal() * moved
            found[method][seed] = answers(at + difficulty + rng.normal(size=n) * 0.4**0.5 > 0, seed)
    return found


def simulated(repeats: int, truth: float = 0.0, **of: Any) -> tuple[list[Interval], list[Interval]]:
    """The differences b - a and the accuracies of a that so many comparisons find."""
    rng = np.random.default_rng(0)
    differences, accuracies = [], []
    for _ in range(repeats):
        drawn = Resampled(world(rng, gap=truth, **of), draws=1000)
        difference = drawn.difference("b", "a")
        assert difference is not None
        differences.append(difference)
        accuracies.append(drawn.accuracy("a"))
    return differences, accuracies


def test_two_identical_methods_are_a_tie_and_intervals_cover_as_they_say() -> None:
    """2,000 comparisons of two methods of 85 %, five seeds with a split of 300 pictures each."""
    differences, accuracies = simulated(2000, seeds=5, n=300)
    assert np.mean([found.sign == 0 for found in differences]) >= 0.95
    for intervals, truth in ((differences, 0.0), (accuracies, 0.85)):
        assert 0.93 <= np.mean([found.lo <= truth <= found.hi for found in intervals]) <= 0.97


@pytest.mark.parametrize("seeds", [2, 3])
def test_with_fewer_seeds_and_pictures_they_are_a_tie_as_often(seeds: int) -> None:
    differences, _ = simulated(500, seeds=seeds, n=150)
    assert np.mean([found.sign == 0 for found in differences]) >= 0.95


def test_five_points_are_found_on_a_thousand_pictures() -> None:
    differences, _ = simulated(500, truth=0.05, seeds=3, n=1000)
    assert np.mean([found.sign > 0 for found in differences]) >= 0.9
    assert 0.93 <= np.mean([found.lo <= 0.05 <= found.hi for found in differences]) <= 0.99


def test_the_probability_of_being_better_goes_with_the_interval() -> None:
    rng = np.random.default_rng(0)
    drawn = Resampled(world(rng, seeds=3, n=400, gap=0.08), draws=4000)
    found, better, worse = drawn.difference("b", "a"), drawn.better("b", "a"), drawn.better("a", "b")
    assert found is not None
    assert better is not None
    assert worse is not None
    assert better + worse == pytest.approx(1, abs=0.02)
    assert (better > 0.975) == (found.sign > 0)
    same = {s: answers(first(80, 100), s) for s in range(3)}
    assert Resampled({"a": same, "b": same}).better("a", "b") == pytest.approx(0.5, abs=0.02)
    assert Resampled({"a": {0: same[0]}, "b": {1: same[1]}}).better("a", "b") is None


def test_pictures_that_were_answered_alike_may_be_drawn_together() -> None:
    """The same interval as from one exponential weight per picture, the definition."""
    rng = np.random.default_rng(0)
    one, other = rng.random(200) < 0.8, rng.random(200) < 0.7
    runs = {"a": {0: answers(one)}, "b": {0: answers(other)}}
    found = Resampled(runs, draws=20_000).difference("a", "b")
    weights = rng.exponential(size=(20_000, 200))
    cells = rng.gamma([0.5, 0.5, 1.0], size=(20_000, 3))
    gap = one.astype(float) - other
    drawn = (weights @ gap + cells[:, 0] - cells[:, 1]) / (weights.sum(1) + cells.sum(1))
    moved = drawn + rng.standard_t(2, 20_000) * SEED_SPREAD * 2**0.5
    assert found is not None
    assert (found.lo, found.hi) == pytest.approx(tuple(np.quantile(moved, [0.025, 0.975])), abs=0.004)


def test_one_picture_set_tested_in_every_seed_is_not_three_picture_sets() -> None:
    right = np.random.default_rng(0).random(200) < 0.8
    shared = Resampled({"a": {s: answers(right, s, shared=True) for s in range(3)}}).accuracy("a")
    fresh = Resampled({"a": {s: answers(right, s) for s in range(3)}}).accuracy("a")
    alone = wilson(int(right.sum()), 200)
    assert shared.half_width > 0.95 * alone.half_width
    assert fresh.half_width < 0.75 * alone.half_width


def test_pairing_narrows_the_difference_of_methods_that_err_on_the_same_pictures() -> None:
    right = np.random.default_rng(0).random(300) < 0.8
    other = right.copy()
    other[:4] = ~other[:4]
    drawn = Resampled(
        {"a": {s: answers(right, s) for s in range(3)}, "b": {s: answers(other, s) for s in range(3)}}
    )
    paired = drawn.difference("b", "a")
    assert paired is not None
    assert paired.half_width < 0.8 * drawn.accuracy("a").half_width


@pytest.mark.parametrize("right", [0, 20])
def test_all_right_and_all_wrong_do_not_collapse(right: int) -> None:
    found = Resampled({"a": {0: answers(first(right, 20))}}).accuracy("a")
    pictures = wilson(right, 20)
    assert found.mean == right / 20
    assert found.lo <= found.mean <= found.hi
    assert found.hi - found.lo >= 0.9 * (pictures.hi - pictures.lo)
    assert found.lo >= 0
    assert found.hi <= 1


def test_methods_that_agree_on_every_picture_still_have_an_interval() -> None:
    same = {s: answers(first(18, 20), s) for s in range(2)}
    found = Resampled({"a": same, "b": same}).difference("b", "a")
    assert found is not None
    assert (found.mean, found.sign) == (0, 0)
    assert found.half_width > 0.02


@pytest.mark.parametrize(("better", "sign"), [(4, 0), (20, 1)])
def test_four_pictures_against_none_are_no_evidence_but_twenty_are(better: int, sign: int) -> None:
    seeds = range(1 if better == 4 else 3)
    runs = {
        "a": {s: answers(first(100, 200), s) for s in seeds},
        "b": {s: answers(first(100 + better, 200), s) for s in seeds},
    }
    found = Resampled(runs).difference("b", "a")
    assert found is not None
    assert found.mean == pytest.approx(better / 200)
    assert found.sign == sign


def test_a_single_picture_and_a_single_seed() -> None:
    found = Resampled({"a": {0: answers(first(1, 1))}, "b": {0: answers(first(0, 1))}})
    difference = found.difference("a", "b")
    assert difference is not None
    assert (difference.mean, difference.sign) == (1, 0)
    assert found.accuracy("a").lo < 0.5


def test_seeds_that_differ_widen_the_interval() -> None:
    steady = {s: answers(first(170, 200), s) for s in range(3)}
    moving = {s: answers(first(n, 200), s) for s, n in enumerate((130, 170, 200))}
    assert (
        Resampled({"a": moving}).accuracy("a").half_width
        > 2 * Resampled({"a": steady}).accuracy("a").half_width
    )


def test_a_difference_is_over_the_seeds_that_both_have() -> None:
    runs = {
        "a": {s: answers(first(50, 100), s) for s in (0, 1)},
        "b": {s: answers(first(n, 100), s) for s, n in ((1, 60), (2, 100))},
        "c": {5: answers(first(9, 10), 5)},
    }
    drawn = Resampled(runs, draws=500)
    found = drawn.difference("b", "a")
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert drawn.shared("a", "b") == [1]
    assert drawn.difference("c", "a") is None


def test_the_same_answers_give_the_same_interval_and_swapping_mirrors_the_mean() -> None:
    runs = world(np.random.default_rng(3), seeds=2, n=50)
    assert Resampled(runs, draws=500).difference("a", "b") == Resampled(runs, draws=500).difference("a", "b")
    one, two = Resampled(runs).difference("a", "b"), Resampled(runs).difference("b", "a")
    assert one is not None
    assert two is not None
    assert one.mean == pytest.approx(-two.mean)
    assert one.lo == pytest.approx(-two.hi, abs=0.006)


def test_a_picture_twice_in_a_split_counts_twice() -> None:
    twice = Answers(np.array([True, True, False]), np.array(["a", "a", "b"]))
    assert Resampled({"m": {0: twice}}, draws=200).accuracy("m").mean == pytest.approx(2 / 3)


def test_wilson_is_the_published_one() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 0 of 20.
    found = wilson(81, 263)
    assert (round(found.lo, 4), round(found.hi, 4)) == (0.2553, 0.3662)
    assert round(wilson(0, 20).hi, 4) == 0.1611
    with pytest.raises(ValueError, match="is no result"):
        wilson(3, 2)


def test_students_interval_over_seeds_agrees_with_scipy() -> None:
    means = [0.81, 0.84, 0.86]
    found = over_seeds(means)
    assert found is not None
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert found.lo == pytest.approx(expected.low)
    assert found.hi == pytest.approx(expected.high)
    assert over_seeds([0.8]) is None


def test_interval_words() -> None:
    found = Interval(0.02, 0.01, 0.03)
    assert found.half_width == pytest.approx(0.01)
    assert (found.sign, (-found).sign, Interval(0, -1, 1).sign) == (1, -1, 0)


@pytest.mark.slow
def test_twelve_methods_ten_seeds_and_five_thousand_pictures_take_seconds() -> None:
    rng = np.random.default_rng(0)
    pool = np.array([f"{i:05d}" for i in range(25_000)])
    pictures = {s: rng.permutation(pool)[:5000] for s in range(10)}
    runs = {
        f"m{m}": {s: Answers(rng.random(5000) < 0.8, hashes) for s, hashes in pictures.items()}
        for m in range(12)
    }
    started = time.process_time()  # whatever else the machine does
    drawn = Resampled(runs)
    for m in range(1, 12):
        assert drawn.difference(f"m{m}", "m0") is not None
        drawn.accuracy(f"m{m}")
    assert time.process_time() - started < 20
