"""The quadratic pull as one operation: the value and gradient of the plain sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headstart.parts.anchor import Anchor


def tensors(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(4, 3, 2, 2), (5,), (), (2, 0), (3, 4)]
    weights = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return weights, [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("owned", [True, False])
def test_value_and_gradient(owned: bool) -> None:
    weights, anchors = tensors()
    plain = (
        sum((w - (a if owned else 0)).square().sum() for w, a in zip(weights, anchors, strict=True)) * 0.15
    )
    ours = Anchor.apply(0.3, len(weights), *weights, *(anchors if owned else ()))
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)
    expected = torch.autograd.grad(plain, weights)
    for got, want in zip(torch.autograd.grad(ours, weights), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


def test_gradient_check() -> None:
    weights, anchors = tensors()
    assert torch.autograd.gradcheck(lambda *w: Anchor.apply(0.3, len(w), *w, *anchors), weights)


def test_no_weights_or_no_strength_costs_nothing_and_is_zero() -> None:
    assert Anchor.apply(0.3, 0).item() == 0
    weights, anchors = tensors()
    total = Anchor.apply(0.0, len(weights), *weights, *anchors)
    assert total.item() == 0
    (total + weights[0].sum()).backward()
    assert torch.equal(weights[0].grad, torch.ones_like(weights[0]))
    assert weights[1].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_single(dtype: torch.dtype) -> None:
    weights, anchors = tensors(dtype)
    total = Anchor.apply(0.3, len(weights), *weights, *anchors)
    assert total.dtype == torch.float32
    plain = sum((w.float() - a.float()).square().sum() for w, a in zip(weights, anchors, strict=True)) * 0.15
    torch.testing.assert_close(total, plain, rtol=1e-6, atol=0)
    total.backward()
    for w, a in zip(weights, anchors, strict=True):
        assert w.grad.dtype == dtype
        assert torch.equal(w.grad, (0.3 * (w.float() - a.float())).to(dtype))


def test_mixed_precision_of_weights() -> None:
    a = torch.ones(2, requires_grad=True)
    b = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    total = Anchor.apply(1.0, 2, a, b)
    assert total.item() == pytest.approx(2.0)


def test_frozen_weights_count_and_get_no_gradient() -> None:
    weights, anchors = tensors()
    weights[0].requires_grad_(False)
    Anchor.apply(0.3, len(weights), *weights, *anchors).backward()
    assert weights[0].grad is None
    assert weights[1].grad is not None


def test_channels_last_weights() -> None:
    weights, anchors = tensors()
    plain = Anchor.apply(0.3, len(weights), *weights, *anchors)
    with torch.no_grad():
        weights[0].data = weights[0].data.contiguous(memory_format=torch.channels_last)
    total = Anchor.apply(0.3, len(weights), *weights, *anchors)
    torch.testing.assert_close(total, plain, rtol=1e-14, atol=0)
    total.backward()
    torch.testing.assert_close(weights[0].grad, 0.3 * (weights[0] - anchors[0]).detach(), rtol=0, atol=0)
