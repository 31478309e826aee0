"""Intervals of the scores in a model card: what another draw of as many pictures could have shown."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_DRAWS = 1000


def intervals(scored: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, list[float]]]:
    """95 % intervals of balanced accuracy, macro F1 and log-loss, by split, from pictures drawn again.

    The percentile bootstrap, 1000 draws; that of the accuracy is Wilson's, in closed form.

    Args:
        scored: probabilities [N, K] and labels [N] by split.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for split, (probabilities, labels) in scored.items():
        rng = np.random.default_rng(0)
        n, classes = probabilities.shape
        cell = labels * classes + probabilities.argmax(1)
        at = probabilities[np.arange(n), labels].astype(np.float64)
        losses = -np.log(np.maximum(at, np.finfo(np.float32).tiny))
        draws: dict[str, list[float]] = {"balanced_accuracy": [], "macro_f1": [], "log_loss": []}
        for _ in range(_DRAWS):
            drawn = rng.integers(0, n, n)
            matrix = np.bincount(cell[drawn], minlength=classes * classes).reshape(classes, classes)
            right, there, said = np.diagonal(matrix), matrix.sum(1), matrix.sum(0)
            present = there > 0
            draws["balanced_accuracy"].append(float((right[present] / there[present]).mean()))
            draws["macro_f1"].append(float((2 * right[present] / (there + said)[present]).mean()))
            draws["log_loss"].append(float(losses[drawn].mean()))
        found[split] = {
            name: [float(edge) for edge in np.quantile(values, (0.025, 0.975))]
            for name, values in draws.items()
        }
    return found
