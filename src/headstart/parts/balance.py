"""How much two added losses should count beside the task's, found while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.parts.memory import Memory
from headstart.parts.ranks import average

Rule = Literal["dynamic", "joint", "static", "schedule", "rates", "norms", "cosine"]

_EPS = 1e-8
_NOISE = 1e-4  # where both losses of a ratio are smaller, it says nothing
_SLOWER = 10  # the slow means of "rates" look back so many times as far
_TEMPERATURE = 2.0  # of "rates": Liu, Johns, Davison, CVPR 2019
_LOOK = 50  # gradients are looked at in every so manieth step
_ALPHAS = ((0.0, 0.2), (1 / 3, 0.6), (1 / 2, 0.9), (2 / 3, 1.0))  # from this share of the epochs on


@dataclass(frozen=True)
class Balance:
    """Weights w₁ and w₂ for losses L₁ and L₂ beside the task's loss L₃, out of running means m.

        dynamic   w_i = clip(κ/2 · m₃ / m_i, 0, w_max)
        joint     w₁ = w₂ = clip(κ · m₃ / (m₁ + m₂), 0, w_max)
        rates     w_i = clip(κ/2 · exp((r_i − r₃)/2), 0, w_max),   r = m / m over ten times as many steps
        norms     w_i = clip(κ/2 · ‖∇L₃‖ / ‖∇L_i‖, 0, w_max),      of the weights that L_i reaches
        cosine    w_i = κ/2 where ⟨∇L₃, ∇L_i⟩ > 0, else 0
        schedule  w₁ = w₂ = κ · (0.8, 0.4, 0.1, 0), from 0, 1/3, 1/2, 2/3 of the epochs on
        static    w₁ = w₂ = κ/2

    What is remembered lies in a `Memory`, so that it is saved with its owner; it is the same on all ranks.

    Args:
        rule: one of these.
        kappa: κ.
        rho: ρ, the share of m that stays at each step; 0 looks at one batch only.
        w_max: the largest weight.
        ramp: steps over which κ grows from nothing; 0: at once.
    """

    rule: Rule
    kappa: float = 1.0
    rho: float = 0.9
    w_max: float = 1.0
    ramp: int = 0

    def begin(self, memory: Memory) -> None:
        """Remember nothing yet."""
        memory["means"] = torch.zeros(3)  # as they run; too small by 1 - ρ^steps
        memory["weights"] = torch.full((2,), min(self.kappa / 2, self.w_max))
        memory["steps"] = torch.zeros((), dtype=torch.long)
        if self.rule == "rates":
            memory["slow"] = torch.zeros(3)
        if self.rule in ("norms", "cosine"):
            memory["ratios"] = torch.ones(2)  # as they were last seen

    def looks(self, memory: Memory) -> bool:
        """Whether `update` wants to know of the gradients this time."""
        return self.rule in ("norms", "cosine") and int(memory["steps"]) % _LOOK == 0

    def update(
        self,
        memory: Memory,
        losses: Tensor,
        *,
        gradients: tuple[Tensor, Tensor] | None = None,
        share: float = 0.0,
    ) -> None:
        """Take in what a batch says; where one of its losses is no number, nothing changes.

        Args:
            memory: begun with.
            losses: L₁, L₂ and L₃ [3].
            gradients: for "norms" and "cosine", where `looks`: ‖∇L₃‖ / ‖∇L_i‖ [2] and the cosines [2].
            share: for "schedule": of the epochs, how many are done.
        """
        means, weights, steps = (memory[name] for name in ("means", "weights", "steps"))
        losses = average(losses).to(means.dtype)
        finite = losses.isfinite().all()
        means.copy_(torch.where(finite, self.rho * means + (1 - self.rho) * losses, means))
        if self.rule == "rates":
            slow, rho = memory["slow"], self._slow_rho
            slow.copy_(torch.where(finite, rho * slow + (1 - rho) * losses, slow))
        steps += finite
        if self.rule == "static":
            return
        if self.rule == "schedule":
            alpha = max(each for each in _ALPHAS if each[0] <= share)[1]
            weights.fill_(min(self.kappa * (1 - alpha), self.w_max))
            return
        ratio, known = self._ratio(memory, gradients)
        part = self.kappa / 2 * ((steps.to(means) / self.ramp).clamp(max=1) if self.ramp else 1)
        weights.copy_(torch.where(known & finite, (part * ratio).clamp(max=self.w_max), weights))

    def means(self, memory: Memory) -> Tensor:
        """The running means [3], corrected for having begun at zero."""
        return _corrected(memory["means"], self.rho, memory["steps"])

    def _ratio(self, memory: Memory, gradients: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """What κ/2 is multiplied by [2], and where that is known [2]."""
        now = self.means(memory)
        own, task = now[:2], now[2]
        if self.rule == "rates":
            rate = now / _corrected(memory["slow"], self._slow_rho, memory["steps"]).clamp(min=_EPS)
            return ((rate[:2] - rate[2]) / _TEMPERATURE).exp(), (now >= _NOISE).all().expand(2)
        if self.rule in ("norms", "cosine"):
            ratios = memory["ratios"]
            if gradients is not None:
                lengths, cosines = gradients
                seen = (lengths if self.rule == "norms" else cosines > 0).to(ratios)
                ratios.copy_(torch.where(cosines.isfinite(), seen, ratios))
            return ratios, torch.ones_like(ratios, dtype=torch.bool)
        own = own.mean().expand(2) if self.rule == "joint" else own
        return task / own.clamp(min=_EPS), (own >= _NOISE) | (task >= _NOISE)

    @property
    def _slow_rho(self) -> float:
        return 1 - (1 - self.rho) / _SLOWER


def _corrected(means: Tensor, rho: float, steps: Tensor) -> Tensor:
    return means / (1 - rho ** steps.clamp(min=1).to(means))
