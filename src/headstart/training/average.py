"""The running average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average of what learns in a module, and of its floating-point buffers.

    Args:
        module: whose weights are averaged.
        decay: weight of the past at each step; 0 derives it from the length, d = 1 - 10/steps (half-life
            about 7 % of the run), after the baseline recipe for small data.
        steps: how many steps the phase has.
    """

    def __init__(self, module: nn.Module, decay: float, steps: int) -> None:
        self.decay = decay if decay > 0 else max(0.0, 1 - 10 / max(1, steps))
        self.live: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.live += [b for b in module.buffers() if b.is_floating_point()]
        self.mean = [tensor.detach().clone() for tensor in self.live]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; early on the average forgets faster than later."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, [tensor.detach() for tensor in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and their average."""
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights are in place inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "updates": self.updates}

    def load(self, state: dict[str, object]) -> None:
        """Take back what `state` gave."""
        mean, updates = state["mean"], state["updates"]
        assert isinstance(mean, list) and isinstance(updates, int)
        for here, saved in zip(self.mean, mean, strict=True):
            here.copy_(saved)
        self.updates = updates
