"""The solver of linear heads: what is not seen through the probe (tests/methods/test_probe.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.logistic import GRID, set_head, solve


def blobs(n: int, classes: int, seed: int, width: int = 5) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    x = centres[y] + 1.5 * torch.randn(n, width, generator=made)
    return x * torch.logspace(-2, 2, width) + 7, y  # features of very different size


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_scipy(classes: int, weighted: bool) -> None:
    """Minimise Σ v ℓ + 1/(2C) ‖W‖² on scaled features by a general-purpose optimiser."""
    C = 0.3
    x, y = blobs(80, classes, 0)
    v = torch.arange(1.0, classes + 1) if weighted else torch.ones(classes)
    solution = solve(x, y, classes, grid=(C,), class_weight=v if weighted else None)

    z = ((x - x.mean(0)) / x.std(0, correction=0)).double()

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        both = torch.tensor(flat, requires_grad=True)
        W, b = both[: classes * 5].view(classes, 5), both[classes * 5 :]
        losses = nn.functional.cross_entropy(z @ W.T + b, y, reduction="none") * v.double()[y]
        total = losses.sum() + W.square().sum() / (2 * C)
        total.backward()
        assert both.grad is not None
        return total.item(), both.grad.numpy()

    best = minimize(
        value_and_gradient, np.zeros(classes * 6), jac=True, method="BFGS", options={"gtol": 1e-8}
    )
    W, b = torch.tensor(best.x[: classes * 5]).view(classes, 5), torch.tensor(best.x[classes * 5 :])
    theirs = (z @ W.T + b).softmax(-1)
    ours = (x.double() @ solution.weight.double().T + solution.bias.double()).softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_c_is_the_one_with_the_least_loss_on_what_it_was_chosen_on() -> None:
    x, y = blobs(40, 3, 0)
    solution = solve(x, y, 3, val=blobs(30, 3, 1))
    tried = sorted(solution.losses)
    assert tried == sorted(GRID)[: len(tried)]  # from the strongest penalty on
    assert solution.losses[solution.C] == min(solution.losses.values())
    if len(tried) < len(GRID):  # the rest was given up after two that lost
        assert tried[-3] >= solution.C


def test_fewer_pictures_than_features_have_the_same_solution() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 70, dtype=torch.float64), torch.arange(24) % 3
    x[torch.arange(24), y] += 3
    solution = solve(x, y, 3, grid=(0.01,))
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    plain = LogisticRegression(C=0.01, tol=1e-10, max_iter=10_000).fit(scaled, y.numpy())
    said = (x.float() @ solution.weight.T + solution.bias).softmax(1)
    assert torch.allclose(said.double(), torch.from_numpy(plain.predict_proba(scaled)), atol=1e-4)


def test_cross_validation_is_repeatable() -> None:
    x, y = blobs(40, 3, 0)
    a, b = solve(x, y, 3), solve(x, y, 3)
    assert a.C == b.C
    assert torch.equal(a.weight, b.weight)
    assert a.losses[a.C] == min(a.losses.values())


def test_one_value_is_not_chosen() -> None:
    assert solve(*blobs(40, 3, 0), 3, grid=(0.7,)).C == 0.7


def test_order_of_the_grid_does_not_matter() -> None:
    x, y = blobs(40, 3, 0)
    val = blobs(30, 3, 1)
    a, b = solve(x, y, 3, val=val), solve(x, y, 3, val=val, grid=GRID[::-1])
    assert a.C == b.C
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=1e-6)


def test_val_may_lack_a_class() -> None:
    x, y = blobs(40, 3, 0)
    held, truth = blobs(30, 3, 1)
    assert solve(x, y, 3, val=(held[truth != 2], truth[truth != 2])).C in GRID


def test_all_features_dead() -> None:
    solution = solve(torch.ones(9, 4), torch.arange(9) % 3, 3, val=(torch.ones(3, 4), torch.arange(3)))
    assert not solution.weight.any()
    torch.testing.assert_close(solution.bias.softmax(-1), torch.full((3,), 1 / 3), rtol=1e-3, atol=1e-3)


def test_missing_class() -> None:
    x, y = blobs(40, 3, 0)
    with pytest.raises(MethodError, match="class 1 has none"):
        solve(x[y != 1], y[y != 1], 3)


@pytest.mark.parametrize("head", [nn.Linear(5, 3), nn.Conv2d(5, 3, 1), nn.Linear(5, 3, bias=False)])
def test_set_head(head: nn.Module) -> None:
    solution = solve(*blobs(40, 3, 0), 3, grid=(0.1,))
    set_head(head, solution)
    assert torch.equal(head.get_parameter("weight").flatten(1), solution.weight)
    if getattr(head, "bias", None) is not None:
        assert torch.equal(head.get_parameter("bias"), solution.bias)


@pytest.mark.parametrize("C", [0.0, -1.0, float("nan")])
def test_a_penalty_that_is_none_is_refused(C: float) -> None:
    x, y = blobs(12, 3, 0)
    with pytest.raises(MethodError, match="a number above 0"):
        solve(x, y, 3, grid=(C,))
