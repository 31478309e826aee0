"""Choices that are hard going forward and soft going backward: the straight-through estimator.

    I = 1 where u + g >= 0, else 0;    Y = σ((u + g)/τ);    value I, gradient of Y

u is by how much a choice is preferred to its alternative, as a difference of logits. Without noise (g = 0)
that is the straight-through sigmoid. With g = G₁ - G₀, of which both are Gumbel distributed, it is the
straight-through Gumbel-softmax of two classes with logits l₁ - l₀ = u: a choice is made with probability
σ(u), whatever τ, which only shapes the gradient.

Paper: Jang, Gu, Poole, ICLR 2017, arXiv 1611.01144; Maddison, Mnih, Teh, ICLR 2017, arXiv 1611.00712.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def straight_through(
    preference: Tensor,
    *,
    tau: float = 1.0,
    noise: Tensor | None = None,
    share: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """Choices, exactly 0 or 1, whose gradient is that of the soft ones; a tie is a 1.

    Computed in float32 or wider, and in that type: half precision would round the soft value, and with it
    the sum that has to be exactly 0 or 1.

    Args:
        preference: u, of any shape.
        tau: τ, temperature of the soft choice.
        noise: g, of the same shape, as `gumbel_noise` draws it; None: no noise, always the preferred one.
        share: σ, what makes the soft choice; or another that rises from 0 to 1 and is 1/2 at 0.
    """
    u = preference.to(torch.promote_types(preference.dtype, torch.float32))
    if noise is not None:
        u = u + noise.to(u.dtype)
    soft = share(u / tau)
    hard = (u >= 0).to(u.dtype)
    # The larger of two shares is 1/2 or more, so that 1 - soft is exact, and so is the sum.
    return (hard - soft).detach() + soft


def gumbel_noise(
    shape: Sequence[int], *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Differences G₁ - G₀ of two Gumbel numbers each, float32.

    Drawn in single precision whatever the network computes in: half precision draws exact zeros, of which
    the logarithm is infinite.

    Args:
        shape: of the result.
        device: where they are drawn.
        generator: of that device; None: torch's own, which checkpoints keep.
    """
    uniform = torch.rand((2, *shape), device=device, dtype=torch.float32, generator=generator)
    gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
    return gumbel[1] - gumbel[0]
