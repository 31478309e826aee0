"""A picture that any network can see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.parts.blank import blank


@pytest.mark.parametrize(
    ("net", "channels"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3)), 1),
        (nn.Conv2d(4, 2, 3), 4),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), 3),
    ],
)
def test_has_the_channels_of_the_first_convolution(net: nn.Module, channels: int) -> None:
    made = blank(net, 8)
    assert made.shape == (1, channels, 8, 8) and not made.any()
    assert torch.isfinite(net(made)).all()
