"""A blank picture, to see a network run where there is no picture yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def blank(net: nn.Module, size: int) -> Tensor:
    """Zeros [1, C, size, size]; C is what the first convolution of `net` sees, 3 where there is none."""
    channels = next((m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.zeros(1, channels, size, size)
