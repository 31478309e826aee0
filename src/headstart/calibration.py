"""Whether a network is as sure as it is right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 15  # as Guo et al. 2017


class Bins(NamedTuple):
    """Pictures sorted by how sure the network was of its answer; bins that hold none are left out."""

    confidence: NDArray[np.float64]  # [B]  mean probability of the answers given
    accuracy: NDArray[np.float64]  # [B]  share of them that was right
    pictures: NDArray[np.int64]  # [B]

    @property
    def error(self) -> float:
        """The expected calibration error: mean gap between the two, weighted by the number of pictures."""
        gap = np.abs(self.confidence - self.accuracy)
        return float((gap * self.pictures).sum() / self.pictures.sum())


def bins(probabilities: NDArray[np.floating], labels: NDArray[np.integer], number: int = BINS) -> Bins:
    """Sort answers into bins of equal width by their confidence (Guo et al., ICML 2017, section 2).

    Args:
        probabilities: [N, K], rows add up to 1.
        labels: [N].
        number: of bins. On a few hundred pictures the error comes out too high by some points even for a
            perfectly calibrated network, because a bin of five pictures is never exactly right.
    """
    said = probabilities.argmax(1)
    sure = probabilities[np.arange(len(said)), said].astype(np.float64)
    at = np.clip(np.ceil(sure * number).astype(int) - 1, 0, number - 1)  # (0, 1/15], (1/15, 2/15], ...
    count = np.bincount(at, minlength=number)
    held = count > 0
    confidence = np.bincount(at, weights=sure, minlength=number)[held] / count[held]
    accuracy = np.bincount(at, weights=said == labels, minlength=number)[held] / count[held]
    return Bins(confidence, accuracy, count[held])
