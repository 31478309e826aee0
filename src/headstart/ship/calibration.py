"""Probabilities that mean what they say, and from when on to ask a human.

    p = softmax(z / T),    T = argmin  Σ_i -log p_i[y_i]  +  mean_i -log p_i[runner-up_i]

A fine-tuned network says 99 % where it is right in 95 of 100 cases. One number T, fitted on the validation
pictures, mends most of that and changes no label (Guo et al., ICML 2017, arXiv 1706.04599). The second term
is one picture more on which the network would have been wrong: where it made no mistake on the few
pictures there are, T would otherwise go to 0 and every probability to 1.

The threshold is the lowest confidence above which the wanted share of the validation pictures is right,
counting, for the same reason, one more that is wrong. Below it a prediction is `unsure`: selective
classification (Geifman & El-Yaniv, NeurIPS 2017, arXiv 1705.08500), without their bound.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field

from headstart.records import Record

_BINS = 15  # of the expected calibration error, as in Guo et al.
_POINTS = 50  # of the curve that is kept
_TEMPERATURES = (1 / 20, 20.0)


class Trust(Record):
    """How far probabilities of one split can be trusted, before calibration and after it."""

    n: int
    log_loss: float
    log_loss_before: float
    calibration_error: float = Field(description="expected calibration error, 15 bins")
    calibration_error_before: float
    answered: float = Field(description="share of the pictures at or above the threshold")
    accuracy: float | None = Field(description="of those; None where there are none")
    interval: tuple[float, float] | None = Field(None, description="95 %, Wilson's, of that accuracy")


class Calibration(Record):
    """What turns logits into probabilities, and probabilities into `unsure`; `calibration.json` holds it."""

    temperature: float = Field(1.0, gt=0, le=1e6)
    wanted: float | None = Field(None, gt=0, lt=1, description="accuracy asked of the answers; None: nobody")
    threshold: float | None = Field(
        0.0, ge=0, le=1, description="lowest probability of an answer; None: none reaches what was wanted"
    )
    risk_coverage: list[tuple[float, float, float]] = Field(
        default_factory=list,
        description="threshold, share of the validation pictures answered, share of these that is wrong",
    )
    val: Trust | None = None
    test: Trust | None = None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits [B, K] -> float64 of the same shape, rows add up to 1."""
        scaled = logits.astype(np.float64) / self.temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        shares = np.exp(scaled)
        out: np.ndarray = shares / shares.sum(axis=1, keepdims=True)
        return out

    def unsure(self, probability: float) -> bool:
        """Whether a human should look at a picture whose best label has this probability."""
        # A hair below it is rounding: engines differ in the last digits.
        return self.threshold is None or probability < self.threshold - 1e-6

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `calibration.json` holds."""
        return self.model_dump(mode="json")


def calibrate(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    accuracy: float = 0.95,
    test: tuple[np.ndarray, np.ndarray] | None = None,
) -> Calibration:
    """Fit the temperature, and find the threshold for a wanted accuracy.

    Args:
        probabilities: of the validation pictures, uncalibrated [N, K].
        labels: [N].
        accuracy: that answers should have, 0 to 1.
        test: probabilities and labels of the test pictures; nothing is fitted on them.
    """
    logits = _logits(probabilities)
    temperature = _temperature(logits, labels)
    fitted = Calibration(temperature=temperature)
    said = fitted.probabilities(logits)
    confidence, right = said.max(1), said.argmax(1) == labels
    threshold, curve = _threshold(confidence, right, accuracy)
    fitted = fitted.model_copy(
        update={"wanted": accuracy, "threshold": threshold, "risk_coverage": curve},
    )
    return fitted.model_copy(
        update={
            "val": _trust(fitted, logits, labels),
            "test": None if test is None else _trust(fitted, _logits(test[0]), test[1]),
        }
    )


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: |confidence - accuracy| over 15 bins of equal width, by their share.

    Args:
        probabilities: [N, K].
        labels: [N].
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(place, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gap).sum() / len(labels))


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    middle, spread = (right + z * z / 2) / (n + z * z), z * math.sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, middle - spread / (n + z * z)), min(1.0, middle + spread / (n + z * z))


def _logits(probabilities: np.ndarray) -> np.ndarray:
    """Logits up to a constant per row, float64 [N, K]; what was rounded to 0 stays far away but finite."""
    tiny = np.finfo(np.float32).tiny
    logs: np.ndarray = np.log(np.maximum(probabilities.astype(np.float64), tiny))
    return logs


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(labels))
    second = np.argsort(logits, axis=1)[:, -2] if logits.shape[1] > 1 else labels

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        scaled = scaled - scaled.max(axis=1, keepdims=True)
        spread = np.log(np.exp(scaled).sum(axis=1))
        return float((spread - scaled[rows, labels]).sum() + (spread - scaled[rows, second]).mean())

    low, high = (math.log(bound) for bound in _TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(math.exp(found.x))


def _threshold(
    confidence: np.ndarray, right: np.ndarray, wanted: float
) -> tuple[float | None, list[tuple[float, float, float]]]:
    """The lowest threshold that reaches the accuracy, and the risk-coverage curve, most confident first."""
    order = np.argsort(-confidence, kind="stable")
    levels, hits = confidence[order], np.cumsum(right[order])
    answered = np.arange(1, len(levels) + 1)
    # A threshold cannot divide pictures of equal confidence.
    ends = np.append(levels[1:] != levels[:-1], True)
    good = ends & (hits / (answered + 1) >= wanted)
    threshold = float(levels[good][-1]) if good.any() else None
    at = np.flatnonzero(ends)
    if len(at) > _POINTS:
        at = at[np.unique(np.linspace(0, len(at) - 1, _POINTS).round().astype(int))]
    curve = [
        (float(levels[i]), float(answered[i] / len(levels)), float(1 - hits[i] / answered[i])) for i in at
    ]
    return threshold, curve


def _trust(calibration: Calibration, logits: np.ndarray, labels: np.ndarray) -> Trust:
    before, after = Calibration().probabilities(logits), calibration.probabilities(logits)
    sure = np.array([not calibration.unsure(float(top)) for top in after.max(1)], dtype=bool)
    right, n = int((after.argmax(1) == labels)[sure].sum()), int(sure.sum())
    return Trust(
        n=len(labels),
        log_loss=_log_loss(after, labels),
        log_loss_before=_log_loss(before, labels),
        calibration_error=calibration_error(after, labels),
        calibration_error_before=calibration_error(before, labels),
        answered=n / len(labels),
        accuracy=right / n if n else None,
        interval=wilson(right, n) if n else None,
    )


def _log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    at = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(at, np.finfo(np.float32).tiny)).mean())
