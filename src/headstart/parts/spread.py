"""How far a network's maps vary: what a distance between maps is measured in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Spread:
    """The spread of maps that come batch by batch; a spread of its own for every channel, then one for all.

    σ² = mean_c var_{b,ij} S[b, c, ij]: so far is a guess off that knows each channel's mean and nothing else.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, Tensor, Tensor] | None = None  # values, means and squares [C] of a channel

    def see(self, x: Tensor) -> None:
        """Maps [B, C, h, w] of one more batch."""
        values = x.detach().to(torch.float64).movedim(1, 0).flatten(1)  # [C, B·h·w]
        n, mean, square = values.shape[1], values.mean(1), values.var(1, unbiased=False)
        if self._seen is not None:
            m, before, spread = self._seen
            step, share = mean - before, n / (m + n)
            square = (1 - share) * spread + share * square + share * (1 - share) * step.square()
            n, mean = m + n, before + share * step
        self._seen = n, mean, square

    @property
    def value(self) -> Tensor:
        """σ: []; 1 where nothing was seen or nothing varies."""
        if self._seen is None:
            return torch.ones(())
        found = self._seen[2].mean().sqrt()
        return torch.where((found > 0) & found.isfinite(), found, torch.ones_like(found))


@contextmanager
def as_in_training(module: nn.Module) -> Iterator[None]:
    """In the mode in which it will learn, and afterwards as if nothing had been run.

    What a network with BatchNorm says in evaluation depends on statistics that may mean nothing yet.
    """
    modes = [(each, each.training) for each in module.modules()]
    buffers = [(each, each.clone()) for each in module.buffers()]
    devices = {each.device for each in module.parameters() if each.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):  # dropout draws
            module.train()
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for each, mode in modes:
            each.training = mode
