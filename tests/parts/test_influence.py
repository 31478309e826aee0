"""Lengths and angles of gradients against gradients that are written down."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.parts.influence import influence


def test_golden() -> None:
    """∇task = (3, 4 | 5); ∇L₁ = (4, 3) on the first two; ∇L₂ = (-2) on the last: 3-4-5 triangles."""
    a = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    task = 3 * a[0] + 4 * a[1] + 5 * b[0]
    lengths, cosines = influence(task, [4 * a[0] + 3 * a[1], -2 * b[0]], [a, b])
    assert lengths.tolist() == pytest.approx([1.0, 2.5], rel=1e-12)  # what a loss does not reach is left out
    assert cosines.tolist() == pytest.approx([24 / 25, -1.0], rel=1e-12)
    task.backward()  # the graph is still there, and no gradient was left behind
    assert a.grad is not None
    assert a.grad.tolist() == [3, 4]


def test_a_gradient_of_zero_has_no_angle() -> None:
    a = torch.ones(2, requires_grad=True)
    _, cosines = influence(a.sum(), [(a * 0).sum()], [a])
    assert math.isnan(cosines.item())
