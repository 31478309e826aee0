"""The best linear head on fixed features: multinomial logistic regression by L-BFGS."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from headstart.errors import MethodError

# Inverse strengths of the L2 penalty, on features of unit variance; weak to strong in half decades.
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


class Solution(NamedTuple):
    """A linear head, and how its penalty was chosen."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    C: float
    losses: dict[float, float]  # C to log-loss on what it was chosen on


def solve(
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    val: tuple[Tensor, Tensor] | None = None,
    grid: Sequence[float] = GRID,
    class_weight: Tensor | None = None,
) -> Solution:
    """Fit a linear head and choose its penalty on validation log-loss.

    Args:
        x: features [N, D].
        y: labels [N]; every class must occur.
        classes: K.
        val: features and labels to choose C on; None: 3-fold cross-validation inside the training data.
        grid: values of C to choose from; one value is taken without choosing.
        class_weight: [K], multiplies the loss of each picture by its class's weight.

    Returns:
        The head for features as they are (the scaling used inside is folded in).
    """
    wrong = [C for C in grid if not C > 0]
    if wrong:
        raise MethodError(f"C = {wrong[0]:g}: the inverse strength of a penalty is a number above 0.")
    missing = sorted(set(range(classes)) - set(y.tolist()))
    if missing:
        raise MethodError(f"A linear head needs a picture of every class; class {missing[0]} has none.")
    features = x.double().numpy()
    labels = y.numpy()
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-6 * max(scale.max(), 1e-12), scale, 1.0)  # a dead feature stays as it is
    features = (features - mean) / scale
    held = None if val is None else ((val[0].double().numpy() - mean) / scale, val[1].numpy())
    rows = None
    if len(features) < features.shape[1]:
        # The best weights lie in the span of the pictures: with fewer pictures than features the same
        # problem in those directions is several times smaller.
        rows = np.linalg.svd(features, full_matrices=False)[2]  # [N, D]
        features = features @ rows.T  # [N, N]
        held = None if held is None else (held[0] @ rows.T, held[1])
    weights = None if class_weight is None else class_weight.double().cpu().numpy()[labels]

    if len(grid) == 1:
        losses = {grid[0]: float("nan")}  # nothing to choose
    elif held is None:
        losses = _cross_validated(features, labels, weights, grid, classes)
    else:
        losses = _along(grid, features, labels, weights, *held, classes)
    best = min(losses, key=lambda C: losses[C])
    model = _fit(best, features, labels, weights)
    weight, bias = _as_softmax(model)
    weight = (weight if rows is None else weight @ rows) / scale
    bias = bias - weight @ mean
    return Solution(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), best, losses)


def set_head(head: nn.Module, solution: Solution) -> None:
    """Copy a solution into a Linear or 1×1 Conv2d head."""
    assert isinstance(head, nn.Linear | nn.Conv2d)
    with torch.no_grad():
        head.weight.copy_(solution.weight.reshape(head.weight.shape))
        if head.bias is not None:
            head.bias.copy_(solution.bias)


def _fit(
    C: float,
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray | None,
    start: LogisticRegression | None = None,
) -> LogisticRegression:
    # Of two classes sklearn keeps one row, the difference of ours; ‖w₁‖² + ‖w₀‖² is half its square.
    strength = 2 * C if y.max() < 2 else C
    model = LogisticRegression(C=strength, max_iter=400, tol=1e-5, warm_start=start is not None)
    if start is not None:
        model.coef_, model.intercept_, model.classes_ = start.coef_, start.intercept_, start.classes_
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # weak penalties flatten; val decides all the same
        model.fit(x, y, sample_weight=weights)
    return model


def _along(
    grid: Sequence[float],
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray | None,
    held: np.ndarray,
    truth: np.ndarray,
    classes: int,
) -> dict[float, float]:
    """Log-loss on held-out features for each C, each fit starting from the stronger penalty's solution.

    Weaker penalties than the second in a row that lost are not tried: they take longest, and lose more.
    """
    losses: dict[float, float] = {}
    model = None
    for C in sorted(grid):
        model = _fit(C, x, y, weights, model)
        losses[C] = float(log_loss(truth, model.predict_proba(held), labels=np.arange(classes)))
        if min(losses.values()) < min(list(losses.values())[-2:]):
            break
    return losses


def _cross_validated(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray | None, grid: Sequence[float], classes: int
) -> dict[float, float]:
    rarest = int(np.bincount(y).min())
    if rarest < 2:
        return {sorted(grid)[len(grid) // 2]: float("nan")}  # nothing to choose on: a middling penalty
    folds = StratifiedKFold(min(3, rarest), shuffle=True, random_state=0)
    rows = [
        _along(grid, x[a], y[a], None if weights is None else weights[a], x[b], y[b], classes)
        for a, b in folds.split(x, y)
    ]
    return {C: float(np.mean([row.get(C, np.inf) for row in rows])) for C in sorted(grid)}


def _as_softmax(model: LogisticRegression) -> tuple[np.ndarray, np.ndarray]:
    """Weights [K, D] and biases [K]; two classes, which sklearn keeps as one row, become two."""
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias
