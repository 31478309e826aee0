from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from headstart.comparison.statistics import Answers, Interval, Resampled, over_seeds, wilson


def answers(right: np.ndarray, seed: int = 0, *, shared: bool = False) -> Answers:
    name = "p" if shared else f"p{seed}"
    return Answers(np.asarray(right, bool), np.array([f"{name}-{i:05d}" for i in range(len(right))]))


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


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_two_identical_methods_are_a_tie_in_95_of_100(seeds: int) -> None:
    rng = np.random.default_rng(0)
    repeats = 300
    ties = 0
    for _ in range(repeats):
        found = Resampled(world(rng, seeds=seeds, n=150), draws=1000).difference("b", "a")
        assert found is not None
        ties += found.sign == 0
    assert ties / repeats >= 0.95


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    found = [
        Resampled(world(rng, seeds=3, n=1000, gap=0.06, spread=0.005), draws=1000).difference("b", "a")
        for _ in range(60)
    ]
    assert np.mean([each is not None and each.sign > 0 for each in found]) >= 0.9


def test_the_interval_of_an_accuracy_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        lo, hi = Resampled(world(rng, seeds=3, n=120), draws=1000).accuracy("a")[1:]
        held += lo <= 0.85 <= hi
    assert 0.92 <= held / 300 <= 0.995


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
    started = time.perf_counter()
    drawn = Resampled(runs)
    for m in range(1, 12):
        assert drawn.difference(f"m{m}", "m0") is not None
        drawn.accuracy(f"m{m}")
    assert time.perf_counter() - started < 20
