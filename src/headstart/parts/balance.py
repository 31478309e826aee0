"""How much two added losses should count beside the task's, found while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.parts.memory import Memory
from headstart.parts.ranks import average

_EPS = 1e-8
_NOISE = 1e-4  # where both losses of a ratio are smaller, it says nothing


@dataclass(frozen=True)
class Balance:
    """Weights w₁ and w₂ for losses L₁ and L₂ beside the task's loss L₃, out of running means m.

        dynamic   w_i = clip(κ/2 · m₃ / m_i, 0, w_max)
        joint     w₁ = w₂ = clip(κ · m₃ / (m₁ + m₂), 0, w_max)
        static    w₁ = w₂ = κ/2

    What is remembered lies in a `Memory`, so that it is saved with its owner; it is the same on all ranks.

    Args:
        rule: one of the three.
        kappa: κ.
        rho: ρ, the share of m that stays at each step; 0 looks at one batch only.
        w_max: the largest weight.
        ramp: steps over which κ grows from nothing; 0: at once.
    """

    rule: Literal["dynamic", "joint", "static"]
    kappa: float = 1.0
    rho: float = 0.9
    w_max: float = 1.0
    ramp: int = 0

    def begin(self, memory: Memory) -> None:
        """Remember nothing yet."""
        memory["means"] = torch.zeros(3)  # as they run; too small by 1 - ρ^steps
        memory["weights"] = torch.full((2,), min(self.kappa / 2, self.w_max))
        memory["steps"] = torch.zeros((), dtype=torch.long)

    def update(self, memory: Memory, losses: Tensor) -> None:
        """Take in L₁, L₂ and L₃ [3] of a batch; where one of them is no number, nothing changes."""
        means, weights, steps = (memory[name] for name in ("means", "weights", "steps"))
        losses = average(losses).to(means.dtype)
        finite = losses.isfinite().all()
        means.copy_(torch.where(finite, self.rho * means + (1 - self.rho) * losses, means))
        steps += finite
        if self.rule != "static":
            now = self.means(memory)
            own, task = now[:2], now[2]
            own = own.mean().expand(2) if self.rule == "joint" else own
            share = self.kappa / 2 * ((steps.to(means) / self.ramp).clamp(max=1) if self.ramp else 1)
            new = (share * task / own.clamp(min=_EPS)).clamp(max=self.w_max)
            weights.copy_(torch.where((own >= _NOISE) | (task >= _NOISE), new, weights))

    def means(self, memory: Memory) -> Tensor:
        """The running means [3], corrected for having begun at zero."""
        return memory["means"] / (1 - self.rho ** memory["steps"].clamp(min=1).to(memory["means"]))
