"""Temperature, calibration error and threshold: their formulas, and data whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from headstart.errors import ModelError
from headstart.ship import contents
from headstart.ship.calibration import Calibration, calibrate, calibration_error, wilson


def drawn(
    n: int, *, classes: int = 5, temperature: float = 2.0, spread: float = 2.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sure by a known temperature, and labels drawn from the true ones."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, spread, (n, classes))
    labels = (true + rng.gumbel(size=true.shape)).argmax(1)  # drawn from softmax(true)
    said = np.exp(true * temperature)
    return (said / said.sum(1, keepdims=True)).astype(np.float32), labels


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    fitted = calibrate(*drawn(20000, temperature=temperature))
    assert fitted.temperature == pytest.approx(temperature, rel=0.03)
    assert fitted.val is not None
    assert fitted.val.calibration_error < 0.015
    if temperature >= 2:
        assert fitted.val.calibration_error < fitted.val.calibration_error_before / 3


def test_the_temperature_is_that_of_the_formula() -> None:
    probabilities, labels = drawn(80, seed=3)
    logits = np.log(probabilities.astype(np.float64))

    def loss(log_t: float) -> float:
        total = 0.0
        wrong = 0.0
        for row, label in zip(logits, labels, strict=True):
            p = np.exp(row / np.exp(log_t))
            p /= p.sum()
            total -= np.log(p[label])
            wrong -= np.log(p[np.argsort(row)[-2]]) / len(labels)
        return total + wrong

    expected = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8}).x)
    assert calibrate(probabilities, labels).temperature == pytest.approx(expected, rel=1e-4)


def test_log_loss_on_unseen_pictures_is_never_worse_beyond_noise() -> None:
    """Fitted on n pictures, looked at on 20,000: over many draws, worse by a hair at most."""
    worse = []
    for seed in range(40):
        n, temperature = (50, 100, 200)[seed % 3], (0.7, 1.0, 1.5, 3.0)[seed % 4]
        fitted = calibrate(*drawn(n, temperature=temperature, seed=seed))
        probabilities, labels = drawn(20000, temperature=temperature, seed=1000 + seed)
        after = fitted.probabilities(np.log(probabilities))
        worse.append(log_loss(after, labels) - log_loss(probabilities, labels))
    assert max(worse) < 0.03 and np.mean(worse) < -0.05


@pytest.mark.parametrize("n", [5, 30, 200])
def test_a_network_without_mistakes_is_not_called_certain(n: int) -> None:
    """All right on n pictures: an error rate of about 1/n is what can be claimed, and no less."""
    labels = np.arange(n) % 3
    probabilities = np.full((n, 3), 0.02, dtype=np.float32)
    probabilities[np.arange(n), labels] = 0.96
    fitted = calibrate(probabilities, labels)
    top = fitted.probabilities(np.log(probabilities)).max(1).mean()
    assert 1 - 2.5 / n < top < 1 - 0.5 / n


def test_certain_and_rounded_probabilities_stay_finite() -> None:
    probabilities = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    fitted = calibrate(probabilities, np.array([0, 1, 2, 0, 1, 1]))
    assert fitted.val is not None and np.isfinite(fitted.val.log_loss)
    json.dumps(fitted.to_dict(), allow_nan=False)


def test_the_calibration_error_is_that_of_the_formula() -> None:
    probabilities, labels = drawn(500)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & ((confidence < low + 1 / 15) | (low + 1 / 15 > 0.999))
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("accuracy", [0.8, 0.9, 0.95])
def test_the_threshold_reaches_what_was_wanted(accuracy: float) -> None:
    fitted = calibrate(*drawn(4000, seed=1), accuracy=accuracy, test=drawn(40000, seed=2))
    assert fitted.threshold is not None and fitted.val is not None and fitted.test is not None
    assert fitted.val.accuracy is not None and fitted.val.accuracy >= accuracy
    assert fitted.test.accuracy == pytest.approx(accuracy, abs=0.02), "on pictures it was not chosen on"
    assert fitted.test.interval is not None and fitted.test.interval[0] < fitted.test.accuracy
    # It is the lowest: with the next less confident answers the accuracy is missed.
    shares = [(cover, risk) for level, cover, risk in fitted.risk_coverage if level < fitted.threshold]
    assert all(1 - risk < accuracy + 0.005 for _, risk in shares)


def test_the_curve_runs_from_the_most_confident_to_all() -> None:
    probabilities, labels = drawn(300)
    curve = calibrate(probabilities, labels).risk_coverage
    levels, covers, risks = map(list, zip(*curve, strict=True))
    assert levels == sorted(levels, reverse=True) and covers == sorted(covers) and len(curve) <= 50
    assert covers[-1] == 1 and risks[-1] == pytest.approx((probabilities.argmax(1) != labels).mean())


def test_what_cannot_be_reached_leaves_all_unsure() -> None:
    rng = np.random.default_rng(0)
    noise = rng.dirichlet(np.ones(4), 60).astype(np.float32)
    fitted = calibrate(noise, rng.integers(0, 4, 60), accuracy=0.99)
    assert fitted.threshold is None and fitted.unsure(1.0)
    assert fitted.val is not None and fitted.val.answered == 0 and fitted.val.accuracy is None
    few = np.full((10, 2), 0.1, dtype=np.float32)
    few[:, 0] = 0.9
    assert calibrate(few, np.zeros(10, int)).threshold is None, "ten right answers are no proof of 95 %"


def test_answers_of_equal_confidence_are_not_divided() -> None:
    probabilities = np.array([[0.9, 0.1]] * 40 + [[0.6, 0.4]] * 40, dtype=np.float32)
    labels = np.array([0] * 40 + [0, 1] * 20)
    fitted = calibrate(probabilities, labels, accuracy=0.95)
    assert fitted.val is not None and fitted.val.answered == 0.5 and fitted.val.accuracy == 1.0
    said = fitted.probabilities(np.log(probabilities)).max(1)
    assert [fitted.unsure(each) for each in (said[0], said[-1])] == [False, True]


def test_without_calibration_nothing_changes() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    plain = Calibration()
    exact = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(plain.probabilities(logits), exact / exact.sum(1, keepdims=True))
    assert not plain.unsure(0.0)


def test_wilsons_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "calibration.json").write_text('{"temperature": -1}')
    with pytest.raises(ModelError, match=r"calibration\.json' is damaged"):
        contents.read(tmp_path)
