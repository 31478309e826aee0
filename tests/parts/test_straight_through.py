"""The straight-through choice against a Gumbel-softmax over two logits, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headstart.parts.straight_through import gumbel_noise, straight_through


def written_out(logits: Tensor, uniform: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Two-class Gumbel-softmax as SpotTune's code has it: the hard and the soft share of class 1."""
    gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
    soft = torch.softmax((logits + gumbel) / tau, -1)
    hard = (logits + gumbel).argmax(-1)
    return hard.to(soft.dtype), soft[..., 1]


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_is_the_gumbel_softmax_of_two_logits(tau: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 7, 2, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(2, 50, 7, generator=torch.Generator().manual_seed(3))
    noise = gumbel_noise((50, 7), generator=torch.Generator().manual_seed(3))
    weight = torch.randn(50, 7, dtype=torch.float64)
    hard, soft = written_out(logits, uniform.movedim(0, -1), tau)
    (theirs,) = torch.autograd.grad((soft * weight).sum(), logits)
    choice = straight_through(logits[..., 1] - logits[..., 0], tau=tau, noise=noise)
    assert torch.equal(choice, hard)
    (ours,) = torch.autograd.grad((choice * weight).sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # the noise is float32 in both


def test_without_noise_it_is_the_sigmoid() -> None:
    u = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
    choice = straight_through(u, tau=2.0)
    assert torch.equal(choice, (u >= 0).double())
    (gradient,) = torch.autograd.grad(choice.sum(), u)
    share = torch.sigmoid(u / 2)
    torch.testing.assert_close(gradient, share * (1 - share) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_exactly_nought_or_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u = (5 * torch.randn(100_000)).to(dtype)
    choice = straight_through(u, tau=0.7, noise=gumbel_noise(u.shape))
    assert bool(((choice == 0) | (choice == 1)).all())
    assert choice.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_temperature_changes_the_gradient_only() -> None:
    torch.manual_seed(0)
    u, noise = torch.randn(1000), gumbel_noise((1000,))
    assert torch.equal(straight_through(u, tau=0.1, noise=noise), straight_through(u, tau=5.0, noise=noise))


@pytest.mark.parametrize("u", [-2.0, 0.0, 1.0])
def test_a_choice_is_as_likely_as_its_logits_say(u: float) -> None:
    n = 200_000
    noise = gumbel_noise((n,), generator=torch.Generator().manual_seed(0))
    share = straight_through(torch.full((n,), u), noise=noise).mean().item()
    expected = 1 / (1 + math.exp(-u))
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))


def test_noise_is_finite_single_and_from_the_generator() -> None:
    first = gumbel_noise((3, 4), generator=torch.Generator().manual_seed(1))
    again = gumbel_noise((3, 4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    torch.manual_seed(1)
    assert torch.equal(gumbel_noise((3, 4)), first)  # None: torch's own
    assert bool(gumbel_noise((500_000,)).isfinite().all())


def test_noise_where_the_uniform_number_is_nought(monkeypatch: pytest.MonkeyPatch) -> None:
    """-log(-log 1e-20) = -3.83 against -log(1e-20) = 46.05 for a uniform 1; by hand."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([[1.0], [0.0]]))
    assert gumbel_noise((1,)).item() == pytest.approx(-3.8297 - 46.0517, abs=1e-3)


def test_a_tie_is_a_one() -> None:
    assert straight_through(torch.zeros(3)).tolist() == [1, 1, 1]
