from __future__ import annotations

import numpy as np
import pytest

from headstart.calibration import bins


def two(sure: np.ndarray) -> np.ndarray:
    return np.stack([sure, 1 - sure], 1)


def test_the_error_by_hand() -> None:
    # Four answers of 0.9, three right; two of 0.6, one right: (4 |0.9-0.75| + 2 |0.6-0.5|) / 6
    said = two(np.array([0.9, 0.9, 0.9, 0.9, 0.6, 0.6]))
    found = bins(said, np.array([0, 0, 0, 1, 0, 1]), 10)
    assert found.pictures.tolist() == [2, 4]
    assert found.confidence == pytest.approx([0.6, 0.9])
    assert found.accuracy == pytest.approx([0.5, 0.75])
    assert found.error == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)


def test_the_plainest_form_agrees() -> None:
    """Guo et al.'s sum, bin by bin."""
    rng = np.random.default_rng(0)
    said = rng.dirichlet(np.ones(4), 500)
    labels = rng.integers(0, 4, 500)
    sure, right = said.max(1), said.argmax(1) == labels
    expected = 0.0
    for m in range(15):
        here = (sure > m / 15) & (sure <= (m + 1) / 15)
        if here.any():
            expected += here.sum() / 500 * abs(right[here].mean() - sure[here].mean())
    assert bins(said, labels).error == pytest.approx(expected)


def test_a_network_that_is_always_sure_and_right_has_no_error() -> None:
    assert bins(two(np.ones(5)), np.zeros(5, int)).error == 0
    assert bins(two(np.ones(5)), np.ones(5, int)).error == 1


def test_a_calibrated_network_comes_near_zero_with_many_pictures() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 100_000)
    labels = (rng.random(100_000) > sure).astype(int)
    assert bins(two(sure), labels).error < 0.01
