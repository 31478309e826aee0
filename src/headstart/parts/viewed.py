"""A source that was trained on pictures prepared otherwise than the network that learns from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Viewed(nn.Module):
    """A network that takes pictures normalised for another one, and sees them normalised for itself.

    One augmented batch serves both networks: x·σ + μ undoes the normalisation it came with, and the
    network's own is put in its place.

    Args:
        net: the network, which expects pictures minus `own[0]`, by `own[1]`.
        given: mean and standard deviation per channel of the pictures that come.
        own: those that `net` was trained with.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        given: tuple[Sequence[float], Sequence[float]],
        own: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.net = net
        # In float64, so that two normalisations that are alike give exactly 1 and 0.
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in pair]
            for pair in (given, own)
        )
        self.register_buffer("scale", (std / own_std).float(), persistent=False)  # [1, C, 1, 1]
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)

    def view(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] as the network expects them."""
        return x * self.scale + self.shift

    def forward(self, x: Tensor) -> Tensor:
        """The network's own output for pictures [B, C, H, W] that were normalised for another."""
        out: Tensor = self.net(self.view(x))
        return out
