import itertools

import pytest

from headstart.training.schedule import factor


def test_warmup_rises_in_a_line_and_never_starts_at_zero() -> None:
    rates = [factor("cosine", step, 100, 0.05) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_falls_to_nearly_zero_without_a_jump() -> None:
    rates = [factor("cosine", step, 100, 0.1) for step in range(100)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_step_falls_to_a_tenth_after_two_thirds() -> None:
    assert [factor("step", step, 9, 0.0) for step in range(9)] == [1.0] * 6 + [0.1] * 3


def test_constant_stays() -> None:
    assert {factor("constant", step, 7, 0.0) for step in range(7)} == {1.0}


def test_a_single_step_learns() -> None:
    assert factor("cosine", 0, 1, 0.0) == 1.0
    assert factor("cosine", 0, 1, 0.05) == 1.0
