"""Random weights, drawn as the field draws them (the whole of it: tests/methods/test_scratch.py)."""

from __future__ import annotations

import math

import torch
from torch import nn

from headstart.parts.fresh import reinitialise


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.full((1, 50, 40), 9.0))
        self.gamma = nn.Parameter(torch.full((8,), 9.0))
        self.my_bias = nn.Parameter(torch.full((8,), 9.0))
        self.scale = nn.Parameter(torch.full((8,), 9.0))


def test_each_kind_of_weight() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 64, 3),
        nn.BatchNorm2d(64),
        nn.Linear(200, 100),
        nn.LayerNorm(100),
        nn.GroupNorm(2, 8),
        Odd(),
    )
    with torch.no_grad():
        for value in net.state_dict().values():
            value.fill_(9)
    reinitialise(net)
    conv, norm, linear, layer, group, odd = net
    assert math.isclose(conv.weight.std().item(), math.sqrt(2 / (64 * 9)), rel_tol=0.03)
    assert math.isclose(linear.weight.std().item(), 0.02 * 0.88, rel_tol=0.03)  # 0.88: cut at two deviations
    assert linear.weight.abs().max() <= 0.04
    for each in (norm, layer, group):
        assert (each.weight == 1).all()
        assert not each.bias.any()
    assert not conv.bias.any()
    assert not linear.bias.any()
    assert not norm.running_mean.any()
    assert (norm.running_var == 1).all()
    assert math.isclose(odd.pos_embed.std().item(), 0.02 * 0.88, rel_tol=0.05)
    assert (odd.gamma == 1e-5).all()
    assert not odd.my_bias.any()
    assert (odd.scale == 1).all()
    assert all(p.requires_grad for p in net.parameters())


def test_a_head_that_is_zero_stays_zero() -> None:
    for head in (nn.Linear(4, 3), nn.Conv2d(4, 3, 1)):
        nn.init.zeros_(head.weight)
        reinitialise(head)
        assert not head.weight.any()
